"""What stages say of a step that they passed on, held against what this launch knows itself: pure."""

from collections.abc import Sequence

from protocol.data import StageTiming


def believable(
    timings: Sequence[StageTiming],
    hosts: Sequence[str | None],
    most_kv_tokens: int,
    submitted_at_s: float,
    arrived_at_s: float,
) -> tuple[StageTiming, ...] | None:
    """The stages' timings, nothing in them longer than the step was under way; None if they are not of these stages.

    `hosts` are the stages', None for this one, whose clock is the one that the step was sent and came back by. Of
    another host's clock only differences count, so that its first stamp may be anything.
    """
    if [timing.stage_index for timing in timings] != list(range(len(hosts))):
        return None
    took_s = max(0.0, arrived_at_s - submitted_at_s)
    kept, host_before, left_at_s = [], None, submitted_at_s
    for timing, host in zip(timings, hosts, strict=True):
        if host != host_before:  # its clock begins anew
            left_at_s = submitted_at_s if host is None else timing.received_at_s
        received_at_s = _within(timing.received_at_s, left_at_s, took_s)
        sent_at_s = _within(timing.sent_at_s, received_at_s, took_s)
        compute_s = min(timing.compute_s, sent_at_s - received_at_s)
        kv_tokens = min(timing.kv_tokens, most_kv_tokens)
        kept.append(StageTiming(timing.stage_index, received_at_s, compute_s, sent_at_s, kv_tokens))
        host_before, left_at_s = host, sent_at_s
    return tuple(kept)


def _within(at_s: float, earliest_s: float, longest_s: float) -> float:
    return min(max(at_s, earliest_s), earliest_s + longest_s)
