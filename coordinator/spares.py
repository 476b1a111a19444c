"""Which spare worker takes the place of one that was lost: pure."""

from collections.abc import Sequence

from protocol.control import Join


def choose_spare(needed: Join | None, spares: Sequence[Join]) -> Join | None:
    """The smallest spare with a device of the lost worker's kind and at least its memory; None if there is none.

    A lost worker that was never there (`needed` None) asks for nothing in particular.
    """
    if needed is None:
        return spares[0] if spares else None
    kind = needed.device.partition(":")[0]
    fitting = [
        spare
        for spare in spares
        if spare.device.partition(":")[0] == kind and spare.memory_total_bytes >= needed.memory_total_bytes
    ]
    return min(fitting, key=lambda spare: (spare.memory_total_bytes, -spare.memory_free_bytes), default=None)
