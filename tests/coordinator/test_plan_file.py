"""Plan files: what they say is kept, what they say wrongly is told at once."""

from pathlib import Path

import pytest

from coordinator.errors import PlanError
from coordinator.limits import ModelLimits
from coordinator.plan import EndsPlan, StagePlan
from coordinator.plan_file import read_plan_file
from coordinator.planning import plan_for

FULL = """
model = "THUDM/chatglm-6b"
revision = "v1"
max_num_seqs = 8
max_model_len = 1000
prefill_chunk = 128

[[stage]]
device = "cpu"
layers = 3
precision = "int8"
threads = 2
kv_budget_tokens = 512

[[stage]]
device = "cuda:0"
layers = "1-2"
kv_budget = "1.5KiB"

[ends]
embeddings = "cuda:0"
final_layernorm = "cpu"
lm_head = "cpu"
precision = "fp32"
lm_head_precision = "int8"
"""


LIMITS = ModelLimits(1024, lambda stage: 10 * (stage.layer_end - stage.layer_start), 100_000)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        plan_for(path, 6, ("cpu",), limits=LIMITS)
    return caught.value.faults


def test_every_key_of_a_plan_file_reaches_the_plan(tmp_path: Path) -> None:
    """Nothing written is ignored."""
    path = write(tmp_path, FULL)
    request = read_plan_file(path)
    assert (request.model, request.revision) == ("THUDM/chatglm-6b", "v1")
    plan = plan_for(path, 3, ("cpu", "cuda:0"), limits=LIMITS)
    assert plan.stages == (
        StagePlan("cuda:0", 0, 2, "fp16", kv_budget_tokens=76),
        StagePlan("cpu", 2, 3, "int8", num_threads=2, kv_budget_tokens=512),
    )
    assert plan.ends == EndsPlan("cuda:0", "fp32", "cpu", "cpu", "int8")
    assert (plan.max_num_seqs, plan.max_model_len, plan.prefill_chunk) == (8, 1000, 128)
    assert plan_for(str(path), 3, ("cpu", "cuda:0"), limits=LIMITS) == plan
    assert plan_for(plan, 3, ("cpu", "cuda:0")) == plan


def test_a_model_that_is_a_path_lies_relative_to_the_plan_file(tmp_path: Path) -> None:
    """A plan can travel with its model; a hub id stays a hub id."""
    (tmp_path / "THUDM" / "chatglm2-6b").mkdir(parents=True)
    for name, model in {
        "./glm": str(tmp_path / "glm"),
        "glm": str(tmp_path / "glm"),
        "models/glm/v2": str(tmp_path / "models" / "glm" / "v2"),
        "/models/glm": "/models/glm",
        "THUDM/chatglm2-6b": str(tmp_path / "THUDM" / "chatglm2-6b"),
        "THUDM/chatglm-6b": "THUDM/chatglm-6b",
        "random:tiny": "random:tiny",
    }.items():
        request = read_plan_file(write(tmp_path, f'model = "{name}"\n[[stage]]\ndevice = "cpu"\nlayers = "1-6"\n'))
        assert (request.model, request.faults) == (model, ())


def test_a_directory_here_is_not_taken_for_one_beside_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for a hub's model: the plan would mean another model wherever it is launched from."""
    (tmp_path / "here" / "org" / "glm").mkdir(parents=True)
    (tmp_path / "plans").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    [fault] = faults_of(write(tmp_path / "plans", 'model = "org/glm"\n' + STAGE))
    assert "not beside the plan file" in fault
    assert fault.endswith("write '../here/org/glm'")


STAGE = '[[stage]]\ndevice = "cpu"\nlayers = "1-6"\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("modle = 'x'\n" + STAGE, "unknown key 'modle'; did you mean 'model'?"),
        (STAGE + "devices = 'x'", "[[stage]] 1: unknown key 'devices'; did you mean 'device'?"),
        (STAGE + "colour = 'x'", "the keys here are device, layers, precision, threads, kv_budget_tokens, kv_budget"),
        (STAGE + "[ends]\nlmhead = 'cpu'", "[ends] unknown key 'lmhead'; did you mean 'lm_head'?"),
        (STAGE + "threads = '4'", "[[stage]] 1: threads must be a whole number, not '4'"),
        (STAGE + "threads = true", "[[stage]] 1: threads must be a whole number, not True"),
        (STAGE + "threads = 0", "[[stage]] 1: threads 0 is out of range"),
        (STAGE + "kv_budget_tokens = -1", "kv_budget_tokens -1 is out of range"),
        (STAGE + "kv_budget = 2048", "[[stage]] 1: kv_budget must be a string, not 2048"),
        (STAGE + "kv_budget = '2 gigs'", "[[stage]] 1: kv_budget '2 gigs' is not a size; write a number and a unit"),
        (STAGE + "kv_budget = '2048'", "such as 2GiB or 800MB"),
        (STAGE + "kv_budget = '59 B'", "kv_budget 59 B is out of range; a token takes 60 bytes in this stage"),
        (STAGE + "kv_budget = '1TB'\nkv_budget_tokens = 9", "kv_budget_tokens 9 and kv_budget 1TB are both given"),
        (STAGE + "max_num_seqs = 9", "[[stage]] 1: unknown key 'max_num_seqs'; it belongs to the top of the file"),
        ("max_num_seqs = 0\n" + STAGE, "max_num_seqs 0 is out of range; it must be from 1 to"),
        ("max_model_len = 1\n" + STAGE, "max_model_len 1 is out of range; it must be from 2 to 1024"),
        ("max_model_len = 1025\n" + STAGE, "it must be from 2 to 1024, the model's context"),
        ("prefill_chunk = 0\n" + STAGE, "prefill_chunk 0 is out of range; it must be from 1 to"),
        (STAGE + "precision = 'fp16'", "[[stage]] 1: fp16 does not compute on a CPU"),
        ("[[stage]]\nlayers = '1-6'", "[[stage]] 1: device is missing"),
        ("[stage]\ndevice = 'cpu'", "each under its own [[stage]]"),
        ("stage = [1]", "[[stage]] 1 is not a table"),
        ("model = ' '\n" + STAGE, "model is empty; name a directory or a hub id"),
        ("model = 'x'", "no stage; add at least one [[stage]]"),
        ("[[stage]\n", "is not TOML"),
        ("[[stages]]\ndevice = 'cpu'\nlayers = '1-6'", "unknown key 'stages'; did you mean 'stage'?"),
        ("[[stage]]\nDevice = 'cpu'\nlayers = '1-6'", "[[stage]] 1: unknown key 'Device'; did you mean 'device'?"),
        (STAGE + "precision = int8 # small", 'precision = int8 # small (text needs quotes: precision = "int8")'),
        ("[[stage]]\ndevice = cpu\n", '(at line 2, column 10): device = cpu (text needs quotes: device = "cpu")'),
        ("[[stage]]\nlayers = 1-6\n", 'layers = 1-6 (text needs quotes: layers = "1-6")'),
        ("[[stage]]\ndevice = “cpu”\n", 'device = “cpu” (text needs quotes: device = "cpu")'),
        ('model = "聊天\n', 'model = "聊天 (the closing quote is missing: model = "聊天")'),
        ("model: demo\n", "model: demo (write '=': model = \"demo\")"),
        (STAGE + "layers = '7'\n", "(at line 4, column 13): layers = '7'"),
    ],
)
def test_a_faulty_plan_file_is_refused_with_one_sentence(tmp_path: Path, text: str, fault: str) -> None:
    """Unknown keys, wrong types, missing keys and broken TOML are named, and nothing else is."""
    faults = faults_of(write(tmp_path, text))
    assert len(faults) == 1
    assert fault in faults[0]


def test_faults_of_form_and_meaning_are_listed_together(tmp_path: Path) -> None:
    """One run shows them all."""
    text = STAGE.replace("1-6", "1-9") + "thread = 1\n[ends]\nlm_head = 'gpu'\nprecision = 'fp8'\n"
    assert len(faults_of(write(tmp_path, text))) == 4


def test_a_plan_file_that_cannot_be_read_is_a_plan_error(tmp_path: Path) -> None:
    """Missing files, directories and bytes that are no text."""
    assert "cannot be read" in faults_of(tmp_path / "none.toml")[0]
    assert "cannot be read" in faults_of(tmp_path)[0]
    (tmp_path / "latin.toml").write_bytes(b"model = '\xff'")
    assert "not UTF-8" in faults_of(tmp_path / "latin.toml")[0]


@pytest.mark.parametrize("text", ["x = " + "[" * 5000 + "]" * 5000, "max_num_seqs = " + "9" * 5000, "x = 1\nx = 2"])
def test_what_no_parser_can_take_is_one_fault(text: str, tmp_path: Path) -> None:
    """Nested without end, a number of thousands of digits: the file is named."""
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(PlanError, match=r"the plan file .*plan\.toml is n"):
        read_plan_file(tmp_path / "plan.toml")


def test_the_home_of_nobody_is_a_name_like_any_other(tmp_path: Path) -> None:
    """It will not be found, and that error says so."""
    (tmp_path / "plan.toml").write_text('model = "~nobody-here/x"')
    assert read_plan_file(tmp_path / "plan.toml").model == "~nobody-here/x"
