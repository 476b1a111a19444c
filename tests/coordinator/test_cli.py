"""The command line: helps by itself, starts fast, and answers every mistake with a line and an exit code."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coordinator.cli import COMMANDS, main, make_parser
from coordinator.commands import doctor
from coordinator.commands.options import plan_request, sampling_overrides
from coordinator.commands.session import _only_warnings
from coordinator.errors import CoordinatorError, PlanError, StageLost, UsageError
from coordinator.plan_file import plan_request_of
from coordinator.planning import plan_for
from glm.errors import ConfigError, HubError, ModelNotFoundError
from protocol.errors import FrameError
from protocol.version import VERSION
from tests.homeless import forget_home
from tests.tiny_checkpoints import CAUSAL, PREFIX
from tests.tiny_tokenizers import train_chatglm2

ROOT = Path(__file__).resolve().parents[2]


def glmpipe(*arguments: str, code: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    start = ["-c", code] if code else ["-m", "coordinator"]
    return subprocess.run([sys.executable, *start, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Enough of a model for a plan to be checked against: four layers, no weights."""
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` suffices: what it does, its options, how to call it."""
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: glmpipe {command}" in out
    assert f"examples:\n  glmpipe {command}" in out


@pytest.mark.parametrize("command", ["chat", "generate", "launch", "dump"])
def test_placement_options_are_the_same_everywhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the predecessor, and a plan file."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    options = "--layers --gpu-precision --cpu-precision --embeddings --final-layernorm --lm-head --plan --model"
    for option in options.split():
        assert option in out


def test_help_lists_the_commands_and_version_is_the_packages() -> None:
    """From a process of its own, without torch being imported."""
    assert glmpipe("--version").stdout == f"glmpipe {VERSION}\n"
    code = (
        "import sys, coordinator.cli\ntry: coordinator.cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = glmpipe(code=code)
    assert (done.returncode, done.stderr) == (0, "")
    for command in (*COMMANDS, "worker"):
        assert f"\n    {command} " in done.stdout


def test_doctor_says_what_is_here() -> None:
    """Versions, threads, and what a worker process finds: memory, kernels, GPUs or why there are none."""
    done = glmpipe("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[:6] == ["glmpipe", "packages", "hub", "threads", "cpu", "kernels:"]
    assert "GB of memory" in lines[4]
    assert any(name.startswith("cuda") for name in names)


def test_doctor_says_why_no_worker_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that fails at once is told with its last words."""
    words = "import sys; sys.exit('torch is broken')"
    monkeypatch.setattr(doctor, "facts_command", lambda: (sys.executable, "-c", words))
    assert main(["doctor"]) == 1
    assert "exit code 1): torch is broken" in capsys.readouterr().err


def test_worker_is_the_stage_worker() -> None:
    """Its options are its own, and so is its help."""
    done = glmpipe("worker", "--help")
    assert done.returncode == 0
    assert "--join" in done.stdout
    assert glmpipe("worker", "--join", "nowhere").returncode == 2


@pytest.mark.parametrize("arguments", [["sing"], ["dump", "--out", "x"], ["generate", "--prompt", "a", "--ids", "1"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command, no prompt, two prompts."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: glmpipe" in capsys.readouterr().err


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was tried, so the exit code is 2; how to go on is all there."""
    assert main([]) == 2
    err = capsys.readouterr().err
    for command in (*COMMANDS, "worker"):
        assert f"\n    {command} " in err


def test_a_bad_plan_is_refused_with_all_its_faults_and_nothing_else(model_dir: Path) -> None:
    """Exit code 2, no traceback, no worker: there are no weights that could be loaded."""
    options = "--layers cpu=1-2 --layers cuda:99=2-9 --layers abacus=3 --cpu-precision fp16 --ends-precision int3"
    done = glmpipe("generate", "--ids", "5", "--model", str(model_dir), *options.split())
    assert done.returncode == 2
    headline, *faults = done.stderr.splitlines()
    assert headline == "glmpipe: the plan has 7 faults:"
    assert len(faults) == 7
    for part in ("layer 2 is in two", "layer 9 is out of range", "layer 3 is in two", "cuda:99", "'abacus'", "'int3'"):
        assert part in done.stderr


def test_a_plan_file_and_options_together_are_refused(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither silently wins; launch's PLAN counts as --plan."""
    plan = model_dir / "plan.toml"
    plan.write_text('[[stage]]\ndevice = "cpu"\nlayers = "1-4"\n')
    arguments = ["--model", str(model_dir), "--layers", "cpu=1-4", "--threads", "1"]
    for command in (["dump", "--ids=5", f"--out={model_dir}/x", "--plan", str(plan)], ["launch", str(plan)]):
        assert main([*command, *arguments]) == 2
        assert f"{plan} and --layers, --threads are both given" in capsys.readouterr().err
    assert main(["launch", str(plan), "--plan", str(plan)]) == 2


def request_of(*arguments: str) -> object:
    from coordinator.cli import make_parser

    return plan_request(make_parser().parse_args(["chat", *arguments]))


def test_a_layers_option_without_a_device_is_a_fault_of_the_plan() -> None:
    """It is listed with the others, not thrown out by the parser."""
    from coordinator.planning import resolve

    request = request_of("--layers", "1-2", "--layers", "cpu=3-9")
    with pytest.raises(PlanError) as caught:
        resolve(request, 4, ("cpu",))  # type: ignore[arg-type]
    assert caught.value.faults == (
        "--layers 1-2: no '='; write DEVICE=LAYERS, such as cuda:1=1-12 or cpu=all",
        "--layers cpu=3-9: layer 9 is out of range; the model's layers are 1-4",
    )


def test_a_layers_option_may_name_another_host() -> None:
    """As `host = ` does in a plan file; the name is checked like there, the device is not looked for here."""
    from coordinator.planning import resolve

    plan = resolve(request_of("--layers", "lab2/cuda:1=2-4", "--layers", "cpu=1"), 4, ("cpu",))  # type: ignore[arg-type]
    assert [(stage.host, stage.device, stage.layers_text) for stage in plan.stages] == [
        (None, "cpu", "1"),
        ("lab2", "cuda:1", "2-4"),
    ]
    with pytest.raises(PlanError, match="'a/b' is no host's name"):
        resolve(request_of("--layers", "a/b/cpu=1-4"), 4, ("cpu",))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="'' is no host's name"):
        resolve(request_of("--layers", "/cpu=1-4"), 4, ("cpu",))  # type: ignore[arg-type]


def test_sampling_options_that_contradict_are_refused() -> None:
    """No option is ignored in silence; what is not given stays the model's."""
    from coordinator.cli import make_parser

    def overrides(*arguments: str) -> dict[str, object]:
        return sampling_overrides(make_parser().parse_args(["chat", *arguments]))

    assert overrides() == {}
    assert overrides("--temperature", "0.5", "--stop", "a", "--stop", "b") == {"temperature": 0.5, "stop": ("a", "b")}
    assert overrides("--greedy", "--seed", "3") == {"greedy": True, "seed": 3}
    with pytest.raises(UsageError, match="--top-k would do nothing"):
        overrides("--greedy", "--top-k", "3")
    with pytest.raises(UsageError, match="--ignore-eos needs --max-new-tokens"):
        overrides("--ignore-eos")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--ids", "5", "--raw"], "--raw is about text"),
        (["--prompt-file", "/nonexistent"], "--prompt-file /nonexistent cannot be read: No such file"),
        (["--ids", "5", "--temperature=-1"], "temperature is -1.0, it must be"),
        (["--ids", "5", "--model", "no/such/model"], "no model "),
        (["--ids", "5", "--connect", "--model", "x", "--stages", "2"], "drop --stages, --model"),
        (["--ids", "5", "--connect", "--trace", "x"], "--trace would look into the launch that --connect uses"),
        (["--ids", "5", "--connect", "--listen", "tcp://192.0.2.1"], "drop --listen"),
        (["--ids", "5", "--connect", "--replan"], "drop --replan"),
        (["--ids", "5", "--await-worker", "3"], "--await-worker 3.0 is for other hosts; add --listen"),
        (["--ids", "5", "--layers", "lab2/cpu=1-6"], "stages of lab2 need a place to join: add --listen"),
        (["--ids", "5", "--listen", "nonsense"], "--listen nonsense: other hosts need an address and a port"),
        (["--ids", "5", "--listen", "tcp://lab2"], "lab2"),
        (
            ["--ids", "5", "--listen", "tcp://192.0.2.1", "--keys", "/nonexistent"],
            "this host has no key (/nonexistent/",
        ),
        (["--ids", "5", "--connect", "nonsense"], "'nonsense' is no endpoint"),
        (["--ids", "5", "--threads", "0"], "--threads 0 is out of range; it must be from 1 to 4096"),
        (["--ids", "5", "--kv-budget", "2", "--stages", "2"], "fault: --kv-budget '2' is not a size; write a number"),
        (["--ids", "5", "--kv-budget-tokens", "0", "--stages", "2"], "fault: --kv-budget-tokens 0 is out of range"),
        (["--prompts", "/nonexistent", "--out", "/tmp/x"], "--prompts /nonexistent: there is no such file"),
        (["--ids", "5", "--watch"], "--watch is for many answers"),
        (["--prompts", __file__, "--out", "/tmp/x", "--watch"], "stderr is none here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever part of the program finds it."""
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("glmpipe: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("ids", "said"),
    [("5,96,7", "96 is outside the vocabulary, the model's ids are 0 to 95"), ("5," * 256, "256 tokens")],
)
@pytest.mark.parametrize("command", ["generate", "dump"])
def test_ids_that_the_model_does_not_have_are_refused_before_loading(
    command: str, ids: str, said: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model without any weights, so that loading would fail otherwise."""
    out = ["--out", str(tmp_path / "x.safetensors")] if command == "dump" else []
    assert main([command, "--ids", ids, "--model", str(model_dir), *out]) == 2
    assert f"glmpipe: --ids: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "dump"])
def test_ids_without_a_prefix_lms_marks_are_refused_before_loading(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without [gMASK] and <sop> ChatGLM-6B has no positions; config.json alone says so, as there are no weights."""
    (tmp_path / "config.json").write_text(json.dumps(PREFIX))
    out = ["--out", str(tmp_path / "x.safetensors")] if command == "dump" else []
    assert main([command, "--ids", "5,6", "--model", str(tmp_path), *out]) == 2
    assert "needs a mask token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "word " * 400], "the model's context holds 256"),
        (["--prompt", "word " * 100, "--max-model-len", "16"], "max_model_len allows 16 together with the answer"),
        (["--ids", "5,6,7", "--max-model-len", "3"], "has 3 tokens, max_model_len allows 3"),
        (
            ["--ids", "5,6,7", "--kv-budget-tokens", "2", "--stages", "1"],
            "KV budget of the tightest stage allows 2",
        ),
    ],
)
def test_a_prompt_without_room_is_refused_before_loading(
    arguments: list[str], said: str, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the config, the plan and the tokenizer alone: there are no weights."""
    (model_dir / "config.json").write_text(json.dumps({**CAUSAL, "padded_vocab_size": 1024}))
    train_chatglm2(model_dir)
    assert main(["generate", *arguments, "--model", str(model_dir)]) == 2
    assert said in capsys.readouterr().err


def test_the_plan_in_launchs_help_is_one_of_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    """ChatGLM-6B has 28 layers, and each of them is in one stage."""
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    example = capsys.readouterr().out.partition("a plan file:")[2].partition("\n\nchat")[0]
    lines = [line.strip() for line in example.splitlines()]
    text = "\n".join(line for line in lines if line.startswith("[") or " = " in line)
    plan = plan_for(plan_request_of(tomllib.loads(text)), 28, ("cpu", "cuda:0"))
    assert [stage.layers_text for stage in plan.stages] == ["1-12", "13-16", "17-28"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["cache"], 0, "the cache has no place: set HOME"),
        (["generate", "--ids", "5", "--model", "{}"], 2, "no weights"),
        (["generate", "--ids", "5", "--model", "~/{}"], 2, "no model"),
        (["keys", "list"], 2, "no such home directory is known (HOME is unset)"),
        (["keys", "--keys", "~nobody-here/k", "list"], 2, "~nobody-here/k is nowhere"),
        (
            ["generate", "--ids", "5", "--model", "org/none"],
            2,
            "org/none has no place: no home directory",
        ),
    ],
)
def test_a_user_without_a_home(
    words: list[str],
    code: int,
    said: str,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """HOME unset and no entry in the list of users: nothing but what is kept there is missed."""
    for name in ("GLMPIPE_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    forget_home(monkeypatch)
    filled = [word.format(model_dir) for word in words]
    try:
        assert main(filled) == code
    except SystemExit as ended:
        assert ended.code == code
    out, err = capsys.readouterr()
    assert said in out + err


@pytest.mark.parametrize("where", ["{}", "{}/absent/x"])
def test_a_dump_that_cannot_be_written_is_refused_before_loading(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory, a file in a missing one."""
    assert main(["dump", "--ids", "5", "--out", where.format(tmp_path)]) == 2
    assert "glmpipe: --out " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a"), 2),
        (PlanError(["a"]), 2),
        (ConfigError("a"), 2),
        (StageLost("a"), 1),
        (CoordinatorError("a"), 1),
        (FrameError("a"), 1),
        (HubError("a"), 1),
        (ModelNotFoundError("a"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_for_users_become_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 for input, 1 for failures while running; our own bugs keep their traceback."""

    def fail(_options: object) -> int:
        raise error

    monkeypatch.setattr("coordinator.commands.compare.run", fail)
    assert main(["compare", "a", "b"]) == code
    assert capsys.readouterr().err in ("", f"glmpipe: {error}\n")

    def bug(_options: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("coordinator.commands.compare.run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["compare", "a", "b"])


def test_a_reader_that_has_gone_is_no_error() -> None:
    """`glmpipe ... | head` ends quietly."""
    code = (
        "import os, sys, coordinator.__main__, coordinator.commands.compare as c\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
        "c.run = lambda options: print('x' * 100000) or 0\n"
        "sys.argv[1:] = ['compare', 'a', 'b']; coordinator.__main__.main()"
    )
    done = glmpipe(code=code)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_the_characters_shows_replacements() -> None:
    """An answer in Chinese does not end in an encoding error."""
    code = (
        "import sys, coordinator.__main__, coordinator.commands.compare as c\n"
        "c.run = lambda options: print('你好 ok') or 0\n"
        "sys.argv[1:] = ['compare', 'a', 'b']; coordinator.__main__.main()"
    )
    done = glmpipe(code=code, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "?? ok\n", "")


def test_a_dump_replaces_no_device(tmp_path: Path) -> None:
    """Writing goes through a new file that takes the old one's place: /dev/null must not be that place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is a device or a socket"):
        COMMANDS["dump"].run(make_parser().parse_args(["dump", "--ids", "1", "--out", str(pipe)]))


def test_warnings_and_errors_of_workers_reach_the_user() -> None:
    """The rest of a worker's lines stays out of a chat."""
    shown: list[str] = []
    log = _only_warnings(shown.append)
    for line in ("INFO joined", "WARNING step 1 failed", "ERROR the control thread failed", "free words"):
        log(f"[stage 1 cpu] {line}")
    assert [line.split()[3] for line in shown] == ["WARNING", "ERROR"]
