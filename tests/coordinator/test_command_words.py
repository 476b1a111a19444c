"""What a command takes without an option's name: a model, a question on standard input; `-` for standard streams."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.cli import main, make_parser
from coordinator.commands import launch
from coordinator.commands.options import plan_request
from coordinator.commands.prompts import read_prompt
from coordinator.errors import PlanError, UsageError
from coordinator.planning import resolve
from coordinator.prompts import prompt_ids
from glm.byte_level_tokenizer import TiktokenTokenizer
from glm.demo import demo_model_dir
from protocol.client import ChatPrompt, ChatTurn, TextPrompt

ROOT = Path(__file__).resolve().parents[2]
MODEL = "THUDM/chatglm2-6b"


@pytest.mark.parametrize("command", ["chat", "generate", "score", "bench", "dump"])
def test_a_model_is_a_word_alone(command: str) -> None:
    """Wherever it stands among the options, and twice if it is the same; every command that has --model."""
    needed = {"score": ["--text", "x"], "dump": ["--ids", "5", "--out", "x"], "generate": ["--ids", "5"]}
    rest = [*needed.get(command, []), "--threads", "2", "-v"]
    parse = make_parser().parse_args
    for words in ([MODEL, *rest], [*rest, MODEL], [*rest, "--model", MODEL], [MODEL, *rest, "--model", MODEL]):
        options = parse([command, *words])
        assert (options.model, options.threads) == (MODEL, 2)
    assert parse([command, *rest]).model is None
    assert parse([command, *rest, str(demo_model_dir())]).model == str(demo_model_dir())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["chat", MODEL, "--model", "THUDM/chatglm3-6b"], "two models are named"),
        (["chat", "--model", "THUDM/chatglm3-6b", MODEL], "two models are named"),
        (["chat", MODEL, MODEL], f"nothing can be done here with '{MODEL}'"),
        (["chat", "chatglm2"], "'chatglm2': it is neither a directory nor a hub id such as THUDM/chatglm2-6b"),
        (["generate", "what is it?"], "a question goes behind --prompt: --prompt 'what is it?'"),
        (["chat", "-q", "-v"], "not allowed with"),
    ],
)
def test_words_that_name_no_model_are_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, with what may have been meant."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_launch_takes_a_plan_or_a_model(tmp_path: Path) -> None:
    """A file is a plan, and so is what is called like one; a directory or a hub id is a model."""

    def chosen(*words: str) -> tuple[str | None, str | None]:
        options = make_parser().parse_args(["launch", *words])
        launch._take_word(options)
        return options.model, options.plan

    assert chosen(MODEL) == (MODEL, None)
    assert chosen("--watch", str(tmp_path)) == (str(tmp_path), None)
    assert chosen("--threads", "2", "plan.toml", "--model", MODEL) == (MODEL, "plan.toml")
    (tmp_path / "plan").touch()
    assert chosen(str(tmp_path / "plan")) == (None, str(tmp_path / "plan"))
    with pytest.raises(UsageError, match="two models are named"):
        chosen(MODEL, "--model", "THUDM/chatglm3-6b")
    with pytest.raises(PlanError, match="both given"):
        chosen("a.toml", "--plan", "b.toml")


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [
        (["cpu=all"], [(0, 6)]),
        (["cpu= All "], [(0, 6)]),
        (["cpu=1-"], [(0, 6)]),
        (["cpu=3-", "cpu=1-2"], [(0, 2), (2, 6)]),
        (["cpu=1-5", "cpu=6-"], [(0, 5), (5, 6)]),
    ],
)
def test_layers_to_the_last_one(layers: list[str], ranges: list[tuple[int, int]]) -> None:
    """Nobody has to know how many there are."""
    words = [word for each in layers for word in ("--layers", each)]
    plan = resolve(plan_request(make_parser().parse_args(["chat", *words])), 6, ("cpu",))
    assert [(stage.layer_start, stage.layer_end) for stage in plan.stages] == ranges


def test_an_open_range_beyond_the_model_is_a_fault() -> None:
    """The first layer is out of range; and `all` twice overlaps."""
    for layers, fault in (("cpu=7-", "layer 7 is out of range"), ("cpu=-", "is not a layer range")):
        with pytest.raises(PlanError, match=fault):
            resolve(plan_request(make_parser().parse_args(["chat", "--layers", layers])), 6, ("cpu",))
    with pytest.raises(PlanError, match="given twice"):
        words = ["chat", "--layers", "cpu=all", "--layers", "cpu=all"]
        resolve(plan_request(make_parser().parse_args(words)), 6, ("cpu",))


def test_special_tokens_and_system_prompts_are_parts_of_a_prompt() -> None:
    """Each where it has a meaning; elsewhere it is refused by name."""

    def prompt(*words: str) -> object:
        return read_prompt(make_parser().parse_args(["generate", *words]))

    text = "<|code_prefix|>你好"
    assert prompt("--raw", "--special-tokens", "--prompt", text) == TextPrompt(text, True)
    assert prompt("--raw", "--prompt", text) == TextPrompt(text, False)
    turns = (ChatTurn("system", "", "be brief"), ChatTurn("user", "", "hi"))
    assert prompt("--system", "be brief", "--prompt", "hi") == ChatPrompt(turns)
    for words in (["--special-tokens", "--prompt", "a"], ["--raw", "--system", "a", "--prompt", "b"]):
        with pytest.raises(UsageError, match=words[0] if words[0] != "--raw" else "--system"):
            prompt(*words)


def test_names_of_special_tokens_are_tokens_only_where_that_is_asked_for() -> None:
    """So that a code model can fill in the middle; by default what is typed is text, whatever it looks like."""
    names = ("[gMASK]", "<sop>", "<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>")
    special = {name: 256 + number for number, name in enumerate(names)}
    tokenizer = TiktokenTokenizer({bytes([byte]): byte for byte in range(256)}, special, "glm4")
    text = "<|code_prefix|>a<|code_suffix|>b<|code_middle|>"
    assert prompt_ids(TextPrompt(text, True), lambda: tokenizer) == [256, 257, 258, ord("a"), 259, ord("b"), 260]
    assert prompt_ids(TextPrompt(text), lambda: tokenizer) == [256, 257, *text.encode()]


def test_a_model_without_a_place_for_a_system_prompt_refuses_it_before_it_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By name, with the remedy; exit code 2, as nothing was tried."""
    for command in (["chat"], ["generate", "--prompt", "hi"]):
        assert main([*command, "--system", "be brief"]) == 2
        err = capsys.readouterr().err
        assert "this model takes no system prompt" in err and "write it into the first question" in err
        assert "ready" not in err


def glmpipe(text: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command with `text` on its standard input."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "coordinator", *map(str, words)]
    return subprocess.run(command, env=environment, input=text, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.usefixtures("base")
def test_a_question_on_standard_input() -> None:
    """`echo ... | glmpipe generate -q`: the answer and nothing else; an empty one is refused."""
    done = glmpipe("日本的首都是哪里？\n", "generate", "-q", "--greedy", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "东京" in done.stdout
    done = glmpipe("\n", "generate")
    assert done.returncode == 2 and "the prompt is empty" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("base")
def test_prompts_come_and_answers_go_through_pipes() -> None:
    """`--prompts - --out -`: a line for each answer, and a fault is told by its line."""
    prompts = '{"id": "a", "prompt": "日本的首都是哪里？"}\n{"prompt": "What is 2 + 3?", "n": 2, "seed": 1}\n'
    piped = ("generate", "--prompts", "-", "--out", "-", "--max-new-tokens", "20", "--threads", "1")
    done = glmpipe(prompts, *piped, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((str(each["id"]), each["index"]) for each in answers) == [("None", 0), ("None", 1), ("a", 0)]
    assert "3 of 3 answers, " in glmpipe(prompts, *piped).stderr
    done = glmpipe("{}\n", *piped)
    assert done.returncode == 2 and "standard input, line 1: exactly one of prompt" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("base")
def test_quiet_still_tells_what_is_wrong() -> None:
    """Warnings and errors stay."""
    done = glmpipe("", "generate", "-q", "--prompt", "hi", "--layers", "cpu=1-2")
    assert done.returncode == 2 and "layers 3-6 are in no stage" in done.stderr
