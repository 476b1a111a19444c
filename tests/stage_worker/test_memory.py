"""What a worker says of the bytes that it moves."""

import subprocess
import sys

from stage_worker.memory import moved_bytes

READS = "import sys; open('/dev/zero', 'rb').read(16 << 20); print(flush=True); sys.stdin.read()"


def test_what_a_child_moves_is_moved() -> None:
    """A worker whose child fetches its model does not look as if it hung, for as long as that takes."""
    before = moved_bytes()
    with subprocess.Popen([sys.executable, "-c", READS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert moved_bytes() - before >= 16 << 20
        child.kill()
