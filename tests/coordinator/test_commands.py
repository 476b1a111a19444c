"""The commands with real worker processes: what they print, and that they leave nothing behind however they end."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from coordinator.cli import main
from tests.commands import PATIENT, glmpipe, start
from tests.coordinator.test_bench import SMALL_MATRICES
from tests.coordinator.test_trace import assert_no_overlaps, read, rows_of
from tests.tiny_checkpoints import CAUSAL
from tests.tiny_tokenizers import write_talking_model

TWO_STAGES = ("--stages", "2", "--threads", "1")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of random weights with a tokenizer."""
    return write_talking_model(tmp_path_factory.mktemp("models") / "tiny")


def read_terminal(terminal: int) -> str:
    """All that is shown until the last process that has it open is gone."""
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError:  # what Linux says at the end
        pass
    finally:
        os.close(terminal)
    return b"".join(parts).decode()


def workers(base: Path) -> list[int]:
    """The living stage workers whose sockets are in `base`, by stage."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"stage_worker" in words and any(word.startswith(f"ipc://{base}/".encode()) for word in words):
            found[words[words.index(b"--worker-id") + 1]] = int(path.parent.name)
    return [found[worker_id] for worker_id in sorted(found)]


def wait_until_nothing_is_left(base: Path) -> None:
    """Workers that noticed by themselves take a moment."""
    deadline_s = time.monotonic() + 60
    while workers(base) or list(base.iterdir()):
        assert time.monotonic() < deadline_s, (workers(base), list(base.iterdir()))
        time.sleep(0.05)


def test_generate_answers_the_same_over_any_split(model_dir: Path, base: Path) -> None:
    """JSON and text agree; the plan, the progress and the stats go to stderr; nothing is left."""
    question = ("generate", "--model", model_dir, "--prompt", "Hello 你好", "--seed", "7", "--max-new-tokens", "12")
    code, out, err = glmpipe(*question, "--json", "--stats", *TWO_STAGES)
    assert code == 0, err
    answer = json.loads(out)
    assert set(answer) == {"ids", "text", "finish_reason", "stats"}
    assert len(answer["ids"]) == answer["stats"]["new_tokens"] == 12
    assert answer["finish_reason"] == "length"
    assert [stage["layers"] for stage in answer["stats"]["stages"]] == ["1-2", "3-4"]
    assert "layer 4 -> fp32 -> cpu" in err
    assert "stage 2 cpu 3-4 fp32: 2/2 layers" in err
    assert "KV tokens" in err
    code, out, err = glmpipe(*question, "--threads", "1")
    assert (code, out) == (0, answer["text"] + "\n"), err
    assert list(base.iterdir()) == []


def test_dumps_of_two_splits_are_the_same_bit_for_bit(
    model_dir: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And compare tells a quantised one from them, naming the first tensor."""
    prompt = ("dump", "--model", model_dir, "--threads", "1", "--ids", "5,64,3", "--out")
    whole, split, small = (tmp_path / name for name in ("whole", "split", "small"))
    assert glmpipe(*prompt, whole)[0] == 0
    assert glmpipe(*prompt, split, "--layers", "cpu=1-3", "--layers", "cpu=4")[0] == 0
    assert glmpipe(*prompt, small, "--cpu-precision", "int8", "--ends-precision", "fp32")[0] == 0
    code = main(["compare", str(whole), str(split)])
    assert (code, capsys.readouterr().out.split(":")[0]) == (0, "the same")
    code = main(["compare", str(whole), str(small)])
    assert (code, capsys.readouterr().out.split()[0]) == (1, "layer.0.key")
    assert list(base.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_launch_that_ends_leaves_no_process_and_no_file(
    number: signal.Signals, code: int, model_dir: Path, base: Path
) -> None:
    """Ctrl-C, a polite end, a closed terminal, and the death of the launcher."""
    with start("launch", "--model", model_dir, *TWO_STAGES) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"serving at ipc://{base}/glmpipe-{process.pid}-")
        assert len(workers(base)) == 2
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert workers(base) == []
        assert list(base.iterdir()) == []
    wait_until_nothing_is_left(base)


def test_a_launch_that_is_stopped_while_starting_leaves_nothing(model_dir: Path, base: Path) -> None:
    """At whatever moment the signal comes: here, when its private directory has just appeared."""
    with start("launch", "--model", model_dir, *TWO_STAGES) as process:
        while not list(base.glob("glmpipe-*/control")):
            assert process.poll() is None
            time.sleep(0.001)
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert workers(base) == []
    assert list(base.iterdir()) == []


def test_a_worker_that_is_killed_ends_the_launch_with_its_name(model_dir: Path, base: Path) -> None:
    """If it is not to be brought back: exit code 1, which stage, which signal, a remedy; nothing is left."""
    with start("launch", "--model", model_dir, *TWO_STAGES, "--recovery-attempts", "0", change=PATIENT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(workers(base)[1], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "\nglmpipe: stage 2 (cpu of this host, pid " in err
    assert "ended with signal SIGKILL while serving; the system has probably run out of memory" in err
    assert "Traceback" not in err
    assert list(base.iterdir()) == []


def test_a_worker_that_is_killed_is_brought_back(model_dir: Path, base: Path) -> None:
    """An idle launch says what was lost and that it serves again; its next answer is a good one."""
    with start("launch", "--model", model_dir, *TWO_STAGES) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        os.kill(workers(base)[1], signal.SIGKILL)
        lines = []
        while not lines or "all stages serve again" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        code, out, _ = glmpipe("generate", "--connect", "--ids", "5,6,7", "--greedy", "--max-new-tokens", "3")
        assert (code, len(out.split(","))) == (0, 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert any("stage 2 (cpu of this host, pid " in line and "SIGKILL" in line for line in lines)
    assert list(base.iterdir()) == []


def test_a_model_whose_weights_are_missing_is_one_line(base: Path, tmp_path: Path) -> None:
    """Found before any worker starts."""
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    code, out, err = glmpipe("generate", "--ids", "5", "--model", tmp_path)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("glmpipe: ")
    assert "Traceback" not in err
    assert list(base.iterdir()) == []


def test_a_traced_launch_that_is_interrupted_has_drawn_what_it_did(model_dir: Path, base: Path, tmp_path: Path) -> None:
    """After Ctrl-C the file is whole JSON: both stages are there, and nothing in a row overlaps."""
    trace = tmp_path / "trace.json"
    with start("launch", "--model", model_dir, "--trace", trace, *TWO_STAGES) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert glmpipe("generate", "--connect", "--prompt", "Hello", "--max-new-tokens", "12", "--greedy")[0] == 0
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err) == (130, False)
    rows = rows_of(read(trace))
    assert_no_overlaps(rows)
    assert len(rows["stage 2 (cpu, layers 3-4)/compute"]) >= 2
    assert sum(event["dur"] for event in rows["stage 1 (cpu, layers 1-2)/compute"]) > 0
    assert list(base.iterdir()) == []


def test_a_panel_is_drawn_over_a_file_of_prompts(model_dir: Path, base: Path, tmp_path: Path) -> None:
    """On a terminal; the last words come after it, and every answer is there."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "Hello", "n": 4, "seed": 1, "max_new_tokens": 30}\n')
    batch = ("generate", "--prompts", prompts, "--out", answers, "--model", model_dir, *TWO_STAGES, "--watch")
    terminal, its_end = os.openpty()
    with start(*batch, stderr=its_end) as process:
        os.close(its_end)
        shown = read_terminal(terminal)
        assert process.wait(timeout=120) == 0, shown
    assert "stage 2 (cpu, layers 3-4)" in shown
    assert len(answers.read_text().splitlines()) == 4
    assert shown.rindex("4 of 4 answers") > shown.index("tokens/s, out")
    assert shown.rindex("\x1b[?25h") > shown.index("\x1b[?25l")  # the cursor is back
    assert list(base.iterdir()) == []


def test_a_panel_is_drawn_over_a_measurement(base: Path) -> None:
    """On a terminal, with what is being measured under it; the figures come alone on stdout."""
    terminal, its_end = os.openpty()
    words = ("--shape", "tiny", "--prompt-tokens", "40", "--new-tokens", "60", *TWO_STAGES, "--watch", "--json")
    with start("bench", *words, stderr=its_end, change=SMALL_MATRICES) as process:
        os.close(its_end)
        shown = read_terminal(terminal)
        assert process.stdout is not None
        figures = json.loads(process.stdout.read())
        assert process.wait(timeout=120) == 0, shown
    assert figures["decode_tokens_per_s"] > 0
    assert "stage 2 (cpu, layers 3-4)" in shown and "tokens/s, out" in shown and "warm-up" in shown
    assert shown.rindex("\x1b[?25h") > shown.index("\x1b[?25l")  # the cursor is back
    assert list(base.iterdir()) == []


def test_a_running_launch_answers_generate_and_chat(model_dir: Path, base: Path) -> None:
    """`--connect` without an endpoint finds it; the same seed gives the same answer as a model launched for it."""
    question = ("--seed", "7", "--max-new-tokens", "12")
    code, alone, err = glmpipe("generate", "--model", model_dir, "--prompt", "Hello", *question, *TWO_STAGES)
    assert code == 0, err
    with start("launch", "--model", model_dir, *TWO_STAGES) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().split()[-1]
        assert glmpipe("generate", "--connect", "--prompt", "Hello", *question)[:2] == (0, alone)
        code, out, err = glmpipe(
            "generate", "--connect", endpoint, "--ids", "5,64", "--greedy", "--json", *question[2:]
        )
        assert code == 0, err
        assert len(json.loads(out)["ids"]) == 12
        process.terminate()
        process.communicate(timeout=120)
    code, out, err = glmpipe("generate", "--connect", endpoint, "--prompt", "Hello")
    assert (code, out) == (1, "")
    assert "the launch has ended" in err
    assert list(base.iterdir()) == []


SECRET = "marker-7b1e"


def logged(base: Path, model_dir: Path, *options: str) -> list[dict[str, object]]:
    """The stderr, line by line, of a launch that answered a prompt with the secret in it, and lost a stage."""
    with start("launch", "--model", model_dir, *TWO_STAGES, "--log-json", *options, change=PATIENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        question = ("generate", "--connect", "--prompt", SECRET, "--max-new-tokens", "4", "--stop", SECRET)
        assert glmpipe(*question)[0] == 0
        os.kill(workers(base)[1], signal.SIGKILL)
        lines: list[str] = []
        while not lines or "all stages serve again" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        process.send_signal(signal.SIGTERM)
        lines += process.communicate(timeout=120)[1].splitlines()
    return [json.loads(line) for line in lines]


def test_a_json_log_is_objects_and_holds_no_prompt(model_dir: Path, base: Path) -> None:
    """From the plan to the end, workers, a request and a recovery included; none is encoded twice."""
    found = logged(base, model_dir)
    assert SECRET not in json.dumps(found)
    assert all({"time", "level", "process", "event", "message"} <= entry.keys() for entry in found)
    events = {entry["event"] for entry in found}
    assert {"plan", "note", "loading", "ready", "serving", "request", "answer", "pipeline", "log"} <= events
    by_workers = [entry for entry in found if entry["process"] == "worker"]
    assert {entry["stage"] for entry in by_workers} == {1, 2}
    assert not [entry for entry in by_workers if str(entry["message"]).startswith("{")]
    assert {1, 2} <= {entry.get("epoch") for entry in by_workers}
    lost, mended = (entry for entry in found if entry["event"] == "pipeline")
    assert "SIGKILL" in str(lost["message"])
    assert (lost["epoch"], mended["epoch"]) == (1, 2)
    assert '"message"' not in str(lost["message"])


def test_prompts_and_answers_are_logged_if_asked_for(model_dir: Path, base: Path) -> None:
    """And then only by the launch: workers see none."""
    found = logged(base, model_dir, "--log-prompts")
    assert [entry["prompt"] for entry in found if entry["event"] == "request"] != []
    assert {entry["process"] for entry in found if SECRET in json.dumps(entry)} == {"coordinator"}
    assert all("answer" in entry for entry in found if entry["event"] == "answer")


def test_what_ends_a_launch_is_an_object_too(base: Path, tmp_path: Path) -> None:
    """An error for users, with its name."""
    code, out, err = glmpipe("launch", "--model", tmp_path / "absent", "--log-json")
    assert (code, out) == (2, "")
    last = json.loads(err.splitlines()[-1])
    assert (last["event"], last["level"], last["error"]) == ("failed", "error", "ModelNotFoundError")
    assert list(base.iterdir()) == []
