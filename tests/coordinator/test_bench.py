"""`glmpipe bench`: its figures exist, agree with each other, and say what was measured. No speed is expected."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.bench import run_bench
from coordinator.bench_report import Workload
from coordinator.bench_streams import prompt_ids
from coordinator.bench_view import progress_on, show
from coordinator.chat_model import launch
from coordinator.cli import main
from coordinator.plan_request import Option, PlanRequest
from glm.config import load_config
from glm.positions import prompt_layout
from tests.commands import glmpipe

KEYS = {
    *("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "decode_efficiency"),
    *("prefill_efficiency", "read_bandwidth_bytes_per_s", "matmul_flops_per_s", "stages", "coordinator"),
}
PART_KEYS = {
    *("device", "layers", "precision", "compute_s", "wire_s", "busy_share", "resident_bytes", "weight_bytes"),
    "kernel_path",
}

SMALL_MATRICES = "import coordinator.roofline as r; r._MATRIX_SIZE = 512"
"""What the machine does at best with large ones takes it many seconds, and nobody asks here."""


def check_figures(found: dict[str, Any]) -> None:
    """What must hold between the figures of any run."""
    assert set(found) >= KEYS
    parts = [*found["stages"], found["coordinator"]]
    for part in parts:
        assert set(part) >= PART_KEYS
        assert 0 < part["decode_compute_s"] <= part["compute_s"]
        assert 0 <= part["decode_wire_s"] <= part["wire_s"]
        assert part["resident_bytes"] > part["weight_bytes"] > 0
        assert 0 < part["busy_share"] <= 1
    assert found["streams"] > 1 or sum(part["busy_share"] for part in parts) <= 1
    assert found["step_weight_bytes"] == sum(part["weight_bytes"] for part in parts)
    step_s, bandwidth = found["decode_step_s"], found["read_bandwidth_bytes_per_s"]
    assert found["decode_tokens_per_s"] * step_s == pytest.approx(found["streams"])
    assert found["decode_efficiency"] == pytest.approx(found["step_weight_bytes"] / step_s / bandwidth)
    prefill_s = found["streams"] * found["prompt_tokens"] / found["prefill_tokens_per_s"]
    assert 0 < found["time_to_first_token_s"] <= prefill_s
    assert found["prefill_efficiency"] * found["matmul_flops_per_s"] > 0


@pytest.mark.slow
def test_two_stages_of_random_weights_from_the_command_line() -> None:
    """JSON alone on stdout; progress and the plan on stderr; lm_head is held as chats hold it."""
    words = "bench --shape tiny --precision int4 --stages 2 --threads 1 --prompt-tokens 48 --new-tokens 8 --streams 3"
    code, out, err = glmpipe(*words.split(), "--json", change=SMALL_MATRICES)
    assert code == 0, err
    found = json.loads(out)
    check_figures(found)
    assert [stage["layers"] for stage in found["stages"]] == ["1-2", "3-4"]
    assert [part["precision"] for part in (*found["stages"], found["coordinator"])] == ["int4", "int4", "int8"]
    assert (found["streams"], found["threads"], found["model"]) == (3, 1, "random:tiny")
    for line in ("lm_head -> int8 -> cpu", "stage 2 cpu 3-4 int4: 2/2 layers", "measuring: decode"):
        assert line in err


@pytest.mark.slow
def test_one_stage_from_python_and_what_a_terminal_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says what ran at which precision with how many threads at which context, and draws every part."""
    monkeypatch.setattr("coordinator.roofline._MATRIX_SIZE", 512)
    seen: list[str] = []
    plan = PlanRequest(num_threads=1, cpu_precision=Option("cpu_precision", "bf16"))
    with launch("random:tiny", plan) as chat_model:
        report = run_bench(chat_model, Workload(40, 5, 1), lambda what, *_: seen.append(what))
        assert chat_model.engine.is_idle
    assert list(dict.fromkeys(seen)) == ["warm-up", "what the machine can do at best", "prefill", "decode"]
    check_figures(json.loads(json.dumps(_as_dict(report))))
    assert report.context == (41, 52)
    stream = io.StringIO()
    show(report, stream)
    text = stream.getvalue()
    for part in (
        "random:tiny, bf16, 1 threads",
        "context 41 to 52",
        "stage 1  cpu     1-4",
        "ends     cpu     ends",
    ):
        assert part in text
    assert text.count("█") + text.count("·") == 24 * 6


def _as_dict(report: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(report)


@pytest.mark.parametrize("shape", ["chatglm-6b", "chatglm2-6b"])
def test_prompts_have_the_wanted_length_and_are_valid(shape: str) -> None:
    """A prefix LM's ends with its marks and nowhere else has any; streams have prompts of their own."""
    config = load_config(Path(f"random:{shape}"))
    ids = prompt_ids(config, 512, stream=0)
    assert len(ids) == 512
    assert ids != prompt_ids(config, 512, stream=1)
    layout = prompt_layout(ids, config)
    assert layout is None or (layout.context_length, layout.mask_position) == (511, 510)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape tiny --model somewhere", "--shape tiny and --model somewhere are both given"),
        ("--shape tiny --streams 0", "--streams 0 must be 1 or more"),
        ("--shape tiny --precision int4 --cpu-precision bf16", "--precision int4 and --cpu-precision are both given"),
        ("--shape tiny --prompt-tokens 2040", "need a context of 2141, random:tiny has 2048"),
        ("--shape tiny --precision fp16", "fp16 does not compute on a CPU"),
        ("--shape chatglm-6b --prompt-tokens 2", "a prompt of this family has 3 at least"),
        ("--model random:huge", "there is no shape 'huge'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2."""
    assert main(["bench", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("glmpipe: ")
    assert err.count("\n") == 1


def test_progress_is_a_line_a_phase_without_a_terminal_and_a_bar_on_one() -> None:
    """Both name what is being done; a pipe gets no control characters."""
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with progress_on(stream) as report:
            for step in range(3):
                report("decode", step, 3)
            report("warm-up", 0, 2)
    assert plain.getvalue().splitlines() == ["measuring: decode", "measuring: warm-up"]
    assert "decode" in terminal.getvalue()
    assert "0/3" in terminal.getvalue()


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True
