"""What is shown of a run fits into 60 columns, cuts nothing off, and names each line's host where there are two."""

import io
import re

import pytest
from rich.console import Console

from coordinator.batch_view import WorkView
from coordinator.bench_report import BenchReport, PartReport
from coordinator.bench_view import show
from coordinator.chat_commands import LISTED
from coordinator.chat_settings import setting_lines
from coordinator.cluster_settings import StageProgress
from coordinator.limits import context_line
from coordinator.memory_plan import Need, judge
from coordinator.plan import EndsPlan, Plan, StagePlan, describe, describe_stages
from coordinator.progress import PlainView, load_view
from coordinator.report import report_lines, two_columns
from coordinator.timing import EngineLoad
from coordinator.trace import stage_titles
from coordinator.watch import Numbers, StageNumbers
from coordinator.watch_view import panel
from glm.printable import num_columns
from glm.sampling_params import ALLOWED
from protocol.records import with_changes
from tests.coordinator.fake_backend import DEFAULTS
from tests.coordinator.test_progress import READY, Terminal
from tests.coordinator.test_report import STATS

NARROW = 60
TWO_HOSTS = Plan(
    (StagePlan("cuda:0", 0, 12, "int8"), StagePlan("cuda:0", 12, 28, "int8", host="lab2")),
    EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32"),
)
HOSTS = ("of this host", "of lab2")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All terminals have 60 columns."""
    monkeypatch.setenv("COLUMNS", str(NARROW))


def shown(text: str) -> str:
    """What a terminal shows, one drawing below the other; nothing is wider than it, or cut off."""
    text = re.sub(r"\x1b\[[0-9;?]*[AKG]|\r", "\n", text)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert all(len(line.rstrip()) <= NARROW for line in text.splitlines()), text
    assert "…" not in text
    return text


def words(text: str) -> str:
    """Without its line ends, so that it does not matter where it was wrapped."""
    return " ".join(text.split())


def test_the_report_of_an_answer() -> None:
    """Two tables in the place of one; all of the numbers are there, and each stage's host."""
    stages = tuple(
        with_changes(stage, device=TWO_HOSTS.place("cuda:0", host))
        for stage, host in zip(STATS.stages, (None, "lab2"), strict=True)
    )
    stats = with_changes(STATS, stages=stages, notes=())
    lines = report_lines(stats, NARROW)
    text = shown("\n".join(lines))
    for part in ("cuda:0 of this host", "cuda:0 of lab2", "1.000 s", "40.0 %", "0.125 s", "KV tokens", "fp32"):
        assert part in text
    assert len(lines) == 3 + 3 + 3
    assert report_lines(stats, 200) == report_lines(stats)


def test_the_panel() -> None:
    """The titles wrap, the bars are shorter."""
    load = EngineLoad(*([1] * len(EngineLoad.__dataclass_fields__)))
    numbers = Numbers((StageNumbers(0.5, 0.1, 40960),) * 2, 0.5, 1000.0, 1000.0, 100.0, 3.0, load)
    for width in (NARROW, 100):
        console = Console(file=io.StringIO(), width=width)
        console.print(panel(numbers, stage_titles(TWO_HOSTS), [131072] * 2, width))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert text.count("40960 of 131072") == 2 and "…" not in text
        for part in ("stage 1 (cuda:0 of", "this host", "lab2", "layers", "13-28)"):
            assert part in (shown(text) if width == NARROW else text)


def test_the_bars_of_a_load() -> None:
    """Names and sizes wrap, and stay whole; lines elsewhere name the host, too."""
    terminal, plain = Terminal(), io.StringIO()
    with load_view(TWO_HOSTS, terminal) as view, PlainView(TWO_HOSTS, plain) as lines:
        for each in (view, lines):
            each.update(StageProgress(0, 12, 12, 13_400_000_000, READY))
            each.update(StageProgress(1, 16, 16, 13_400_000_000, READY))
    assert "…" not in terminal.getvalue()
    for part in ("ready in", "12/12 layers", "13.4 GB"):
        assert part in words(shown(terminal.getvalue()))
    for number, host in zip((1, 2), HOSTS, strict=True):
        assert f"stage {number} cuda:0 {host} " in plain.getvalue()
        assert f"stage {number} (cuda:0 {host}) computes with" in plain.getvalue()


def test_the_bar_of_many_answers() -> None:
    """All that is said beside it is there."""
    terminal, now_s = Terminal(), 0.0
    with WorkView(terminal, "answers", 40000, clock=lambda: now_s) as view:
        view.totals.num_done, view.totals.num_tokens, view.totals.num_failed = 28000, 10**7, 3
        now_s = 1000.0
        view.update()
    for part in ("28000/40000 answers", "10000.0 tokens/s", "left, 3 failed"):
        assert part in words(shown(terminal.getvalue()))


def test_the_figures_of_a_bench() -> None:
    """The table comes in two parts."""
    part = PartReport("cuda:0 of lab2", "13-28", "int8", 1.5, 0.5, 0.75, 1.0, 0.25, 10**10, 10**9, "torch")
    speeds = (120.5, 10.5, 1.25, 0.095, 0.861, 0.12, 41.2e9, 1.23e12, "bfloat16", 3_100_000_000, None)
    report = BenchReport("glmpipe-demo", "int8", 512, 64, 1, 8, "2.10", 1.0, *speeds, (part, part), part)
    terminal = Terminal()
    show(report, terminal)
    text = shown(terminal.getvalue())
    for word in ("precision", "cuda:0 of lab2", "resident", "10.0 GB", "busy", "86.1%", "(bfloat16 matmul)"):
        assert word in words(text)


def test_wide_characters_are_aligned_by_their_columns() -> None:
    """Names and tokens of any script have what is said of them in one column."""
    lines = two_columns([('stop=["结束"]', "texts"), ("seed=none", "a number")])
    assert len({num_columns(line.rpartition("   ")[0]) for line in lines}) == 1


def test_the_lists_of_a_chat() -> None:
    """Each name has its explanation below it."""
    lines = two_columns([(command.usage, command.help) for command in LISTED], NARROW)
    lines += setting_lines(DEFAULTS, ALLOWED, NARROW)
    text = shown("\n".join(lines))
    assert "/save FILE\n    write the conversation" in text
    assert "repetition_penalty=1.0" in text


def test_each_line_of_a_plan_names_its_host() -> None:
    """Where there are two; where there is one, none does."""
    for lines in (describe(TWO_HOSTS), describe_stages(TWO_HOSTS), describe(TWO_HOSTS, verbose=True)):
        assert all(line.endswith(HOSTS) for line in lines), lines
    assert "stage 2 (cuda:0 of lab2, layers 13-28)" in context_line(TWO_HOSTS, 8192, [4096, 2048])
    one = Plan(TWO_HOSTS.stages[:1], TWO_HOSTS.ends)
    assert not any("host" in line for line in (*describe(one), *stage_titles(one)))


def test_the_memory_of_each_host_is_told_apart() -> None:
    """The same device of two hosts is two places."""
    needs = [Need(f"stage {host}", (host, "cuda:0"), 10**9, 10**8, 1000, None) for host in ("lab1", "lab2")]
    verdict = judge(needs, {need.place: 8 * 10**9 for need in needs}, 4096, 4096)
    assert [line.partition(":0 ")[2].partition(":")[0] for line in verdict.lines] == ["of lab1", "of lab2"]
    assert judge(needs[:1], {needs[0].place: 8 * 10**9}, 4096, 4096).lines[0].startswith("memory of cuda:0: ")
