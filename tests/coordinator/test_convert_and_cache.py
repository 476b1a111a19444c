"""`glmpipe convert` and `glmpipe cache` as a user types them."""

from pathlib import Path

import pytest

from coordinator.chat_model import launch
from coordinator.cli import main
from coordinator.plan_request import Option, PlanRequest
from coordinator.planning import plan_for
from glm.model_source import MadeFor, made_for
from tests.tiny_checkpoints import CAUSAL, PREFIX, write_checkpoint


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_convert_and_check(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Says what it made; --check reads it all; a changed byte is found and named."""
    out = tmp_path / "out"
    code, _, said = run(capsys, "convert", model_dir, "--precision", "int4", "--out", out, "--threads", 1)
    assert (code, said.split(" in ")[0]) == (0, f"{out}: 42.8 kB")
    assert made_for(out) == MadeFor(False, "int4", "int8")
    code, _, said = run(capsys, "convert", out, "--check")
    assert code == 0
    assert "all 7 files (42.8 kB) are as they were written" in said
    layer = out / "layer-00002.safetensors"
    layer.write_bytes(layer.read_bytes()[:-1] + b"!")
    code, _, said = run(capsys, "convert", out, "--check")
    assert code == 2
    assert "layer-00002.safetensors is truncated or damaged" in said


def test_what_was_published_quantised_keeps_its_lm_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its plan does; told otherwise, it is quantised."""
    write_checkpoint(tmp_path / "model", {**PREFIX, "quantization_bit": 4})
    convert = ("convert", tmp_path / "model", "--precision", "int4", "--out")
    assert run(capsys, *convert, tmp_path / "a")[0] == 0
    assert made_for(tmp_path / "a") == MadeFor(True, "int4", None)
    assert run(capsys, *convert, tmp_path / "b", "--lm-head-precision", "int4")[0] == 0
    assert made_for(tmp_path / "b") == MadeFor(False, "int4", "int4")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("convert", "MODEL"), "convert needs --precision and --out"),
        (("convert", "MODEL", "--precision", "fp16", "--out", "OUT"), "--precision fp16: choose int8 or int4"),
        (("convert", "MODEL", "--precision", "int3", "--out", "OUT"), "--precision int3: choose int8 or int4"),
        (("convert", "MODEL", "--precision", "int8", "--out", "MODEL"), "not empty, it holds config.json"),
        (("convert", "OUT", "--precision", "int8", "--out", "OUT"), "no directory here"),
        (("convert", "MODEL", "--precision", "int8", "--out", "OUT", "--threads", "0"), "must be 1 or more"),
        (("convert", "MODEL", "--check", "--out", "OUT"), "--check only reads, so --out would do nothing"),
        (("convert", "MODEL", "--check"), "is not a converted model"),
        (("cache", "--all"), "only prune removes something"),
        (("cache", "prune"), "say what prune is to remove"),
        (("cache", "prune", "--all", "--older-than", "3"), "say what prune is to remove"),
        (("cache", "prune", "--older-than", "-1"), "must be 0 or more"),
        (("cache", "prune", "--max-size", "big"), "write a number and a unit, such as 2GiB or 800MB"),
        (("cache", "prune", "--max-size", "20"), "--max-size '20' is not a size; write a number and a unit"),
        (("generate", "--prompt", "x", "--no-cache", "--cache-dir", "OUT"), "are both given"),
    ],
)
def test_mistakes_get_a_line(
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    """Exit code 2, no traceback, nothing made."""
    monkeypatch.setenv("GLMPIPE_CACHE", "on")
    monkeypatch.setenv("GLMPIPE_CACHE_DIR", str(tmp_path / "cache"))
    places = {"MODEL": str(model_dir), "OUT": str(tmp_path / "out")}
    code, _, said = run(capsys, *(places.get(word, word) for word in arguments))
    assert code == 2
    assert complaint in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_converted_model_is_planned_as_it_was_made() -> None:
    """Its own precision by default, in every stage; an explicit one is obeyed; without a plan it answers alike."""
    made = {"precision": "int4", "lm_head_precision": "int8"}
    plan = plan_for(PlanRequest(num_stages=2), 4, ("cpu",), **made)
    assert [stage.precision for stage in plan.stages] == ["int4", "int4"]
    assert plan.ends.lm_head_precision == "int8"
    assert plan_for(None, 4, ("cpu",), precision="int8", lm_head_precision="int4").ends.lm_head_precision == "int4"
    assert plan_for(None, 4, ("cpu",), is_quantized=True, precision="int8").ends.lm_head_precision == "fp32"
    plan = plan_for(PlanRequest(cpu_precision=Option("--cpu-precision", "bf16")), 4, ("cpu",), **made)
    assert (plan.stages[0].precision, plan.ends.lm_head_precision) == ("bf16", "bf16")


@pytest.mark.slow
def test_a_launch_of_a_converted_model_answers_as_one_that_quantises(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through real workers, two of them on the converted directory."""
    assert run(capsys, "convert", model_dir, "--precision", "int4", "--out", tmp_path / "out")[0] == 0
    wish = PlanRequest(cpu_precision=Option("--cpu-precision", "int4"))
    answers = []
    for model, request in ((model_dir, wish), (tmp_path / "out", PlanRequest(num_stages=2))):
        with launch(model, request) as chat_model:
            assert {stage.precision for stage in chat_model.cluster.plan.stages} == {"int4"}
            answers.append(chat_model.generate([5, 6, 7], max_new_tokens=8, greedy=True, ignore_eos=True).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_second_run_finds_the_first_ones_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once that layers are kept, found by another split, shown, and pruned."""
    keys = {**CAUSAL, "hidden_size": 768, "num_attention_heads": 24, "kv_channels": 32, "ffn_hidden_size": 2048}
    write_checkpoint(tmp_path / "model", {**keys, "num_layers": 2})
    monkeypatch.setenv("GLMPIPE_CACHE", "on")
    monkeypatch.setenv("GLMPIPE_CACHE_DIR", "/nowhere")
    cache = tmp_path / "cache"
    command = ("generate", "--model", tmp_path / "model", "--ids", "5,6", "--max-new-tokens", 2, "--greedy", "--json")
    command = (*command, "--cpu-precision", "int8", "--cache-dir", cache, "-v")
    code, first, said = run(capsys, *command)
    assert code == 0
    assert f"quantised layers are kept in {cache}" in said
    assert "0 of 2 layers were found" in said
    code, second, said = run(capsys, *command, "--stages", 2)
    assert code == 0
    assert "quantised layers are kept" not in said
    assert said.count("1 of 1 layers were found") == 2
    assert first.split('"stats"')[0] == second.split('"stats"')[0]
    code, shown, _ = run(capsys, "cache", "--cache-dir", cache)
    assert code == 0
    assert "int8  model  (2 parts, used today)" in shown
    code, shown, _ = run(capsys, "cache", "prune", "--all", "--cache-dir", cache)
    assert code == 0
    assert "removed model int8: 12.1 MB" in shown
    assert not list(cache.iterdir())
    code, shown, _ = run(capsys, "cache", "--cache-dir", cache)
    assert "nothing is kept in" in shown


def test_a_switched_off_cache_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`GLMPIPE_CACHE=off`."""
    monkeypatch.setenv("GLMPIPE_CACHE", "off")
    code, shown, _ = run(capsys, "cache")
    assert (code, shown) == (0, "the cache is switched off (GLMPIPE_CACHE)\n")
