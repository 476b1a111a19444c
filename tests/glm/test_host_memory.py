"""Memory that this process may take: the host's, or less if a control group says so."""

from pathlib import Path

import pytest

from glm.host_memory import host_memory, num_oom_kills

GB = 10**9
STAT = "anon 5\ninactive_file 200000000\nactive_file 100000000\n"
STAT_V1 = "cache 5\ntotal_inactive_file 200000000\ntotal_active_file 100000000\n"


def make_root(tmp_path: Path, files: dict[str, str]) -> Path:
    host = {"proc/meminfo": f"MemTotal: {16 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {10 * GB // 1024} kB\n"}
    for name, text in (host | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def group(path: str, limit: object, used: int, stat: str = STAT) -> dict[str, str]:
    names = {"memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}
    return {f"sys/fs/cgroup/{path}{name}": f"{text}\n" for name, text in names.items()}


def test_of_this_host() -> None:
    """Something, and not more than there is."""
    total, available = host_memory()
    assert 0 < available <= total


def test_kills_for_want_of_memory_are_counted_where_the_system_says_so(tmp_path: Path) -> None:
    """By the kernel, of all processes; a system that does not tell is not taken to have none."""
    assert num_oom_kills(tmp_path) is None
    assert num_oom_kills(make_root(tmp_path, {"proc/vmstat": "pgfault 12\noom_kill 3\n"})) == 3


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 16.0, 10.0),
        ({"proc/self/cgroup": "0::/\n"} | group("", "max", GB), 16.0, 10.0),
        ({"proc/self/cgroup": "0::/\n"} | group("", 4 * GB, GB), 4.0, 3.3),
        ({"proc/self/cgroup": "0::/a/b\n"} | group("a/b/", "max", GB) | group("a/", 3 * GB, GB), 3.0, 2.3),
        ({"proc/self/cgroup": "0::/a/b\n"} | group("a/b/", 2 * GB, GB) | group("a/", 8 * GB, 7 * GB), 2.0, 1.3),
        ({"proc/self/cgroup": "0::/not/seen/here\n"} | group("", 4 * GB, GB), 4.0, 3.3),
        ({"proc/self/cgroup": "0::/../../elsewhere\n"} | group("", 4 * GB, GB), 4.0, 3.3),
        ({"proc/self/cgroup": "0::/\n"} | group("", 4 * GB, 5 * GB, ""), 4.0, 0.0),
        ({"proc/self/cgroup": "0::/\n"} | group("", 64 * GB, GB), 16.0, 10.0),
    ],
)
def test_control_groups(tmp_path: Path, files: dict[str, str], total: float, available: float) -> None:
    """Of version 2, limits at any height; page cache counts as available; a larger limit than the host is none."""
    found = host_memory(make_root(tmp_path, files))
    assert [round(number / GB, 2) for number in found] == [total, available]


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    """Their memory controller has other names for the same."""
    base = "sys/fs/cgroup/memory/box/"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n",
        f"{base}memory.limit_in_bytes": str(4 * GB),
        f"{base}memory.usage_in_bytes": str(2 * GB),
        f"{base}memory.stat": STAT_V1,
    }
    assert [round(number / GB, 2) for number in host_memory(make_root(tmp_path, files))] == [4.0, 2.3]
