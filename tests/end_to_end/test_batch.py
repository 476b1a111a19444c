"""Files of prompts, several answers and scores through real worker processes, with the demo model."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.demo import demo_model_dir
from glm.model import Model, Segment
from glm.positions import prompt_layout
from glm.tokenizer import load_tokenizer
from tests.commands import glmpipe, start
from tests.tiny_checkpoints import PREFIX, write_checkpoint
from tests.tiny_tokenizers import train_chatglm

pytestmark = pytest.mark.slow
SPLIT = ("--stages", "2", "--threads", "1")
QUESTIONS = ("你好", "What is a stage worker?", "日本的首都是哪里？", "What is 17 + 15?", "显存不够怎么办？")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Each question several times, one with two answers, one with log-probabilities, one too long for the model."""
    lines: list[dict[str, Any]] = [
        {"prompt": QUESTIONS[number % 5], "id": f"q{number}", "greedy": True} for number in range(40)
    ]
    lines += [{"prompt": QUESTIONS[0], "n": 2, "seed": 5}]
    lines += [{"prompt": QUESTIONS[2], "greedy": True, "logprobs": 2}, {"prompt": "长" * 2000}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def results(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The last line of each answer."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["line"], line["index"]): line for line in lines}


def texts(path: Path) -> dict[tuple[int, int], str]:
    """Those that were not drawn by lot: sums round otherwise in steps of other sizes."""
    return {key: line["text"] for key, line in results(path).items() if "error" not in line and key[0] != 41}


def test_a_file_is_answered_interrupted_and_finished(prompts: Path, tmp_path: Path) -> None:
    """Ctrl-C and a torn line lose nothing that was written; all runs together give what one run gives, and what a
    running launch gives to one that connects; what cannot be answered has an error and spoils nothing."""
    out, again, remote = (tmp_path / name for name in ("out", "again", "remote"))
    with start("generate", "--prompts", prompts, "--out", out, *SPLIT, "--max-num-seqs", "4") as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command does what is missing" in err
    assert "Traceback" not in err
    first = out.read_bytes()
    num_first = first.count(b"\n")
    assert 5 <= num_first < 43
    out.write_bytes(first + b'{"id": "q3", "li')
    code, _, err = glmpipe("generate", "--prompts", prompts, "--out", out, *SPLIT)
    assert code == 1, err
    assert "16 bytes are cut" in err
    assert "43 of 44 answers in " in err and "1 failed by themselves" in err
    assert out.read_bytes().startswith(first)
    found = results(out)
    assert len(found) == 44
    assert "the model's context holds 1024" in found[43, 0]["error"]
    assert "日本的首都是东京" in found[42, 0]["text"]
    assert len(found[42, 0]["logprobs"]) == found[42, 0]["new_tokens"] == len(found[42, 0]["token_ids"])
    assert all(each["top"][0][0] == each["token_id"] for each in found[42, 0]["logprobs"])
    assert glmpipe("generate", "--prompts", prompts, "--out", again, "--stages", "1", "--threads", "1")[0] == 1
    assert texts(again) == texts(out)
    with start("launch", *SPLIT) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().split()[-1]
        code, _, err = glmpipe("generate", "--connect", endpoint, "--prompts", prompts, "--out", remote)
        process.terminate()
        process.communicate(timeout=120)
    assert code == 1, err
    assert texts(remote) == texts(out)
    for key in ("token_ids", "finish_reason", "prompt_digest", "prompt_tokens"):
        assert results(remote)[42, 0][key] == found[42, 0][key]
    assert [each["token_id"] for each in results(remote)[42, 0]["logprobs"]] == found[42, 0]["token_ids"]


def test_several_answers_and_logprobs_to_one_prompt() -> None:
    """As a list in JSON, else with a header each; answer i is what a request with the seed plus i gets, anywhere."""
    question = ("generate", "--prompt", QUESTIONS[1], "--top-p", "1", "--max-new-tokens", "8")
    code, out, err = glmpipe(*question, *SPLIT, "--n", "3", "--seed", "4", "--json", "--logprobs", "2")
    assert code == 0, err
    answers = json.loads(out)
    assert len(answers) == 3
    assert all(len(each["logprobs"]) == len(each["ids"]) for each in answers)
    with start("launch", *SPLIT, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        connected = (*question, "--connect", process.stdout.readline().split()[-1])
        code, alone, _ = glmpipe(*connected, "--seed", "6")
        assert (code, alone.rstrip("\n")) == (0, answers[2]["text"])
        code, out, _ = glmpipe(*connected, "--n", "3", "--seed", "4", "--logprobs", "1")
    assert out.startswith(f"--- answer 1 of 3 ---\n{answers[0]['text']}\n")
    assert out.count("likeliest:") == sum(len(each["ids"]) for each in answers)


def prefix_lm_dir(model_dir: Path) -> Path:
    """A prefix LM of random weights, with a tokenizer of its kind."""
    model_dir.mkdir()
    train_chatglm(model_dir, num_image_tokens=0)
    ids = SentencePieceProcessor(model_file=str(model_dir / "ice_text.model")).piece_to_id
    names = {"mask": "[MASK]", "gmask": "[gMASK]", "bos": "<sop>", "eos": "<eop>", "pad": "<pad>"}
    keys = {f"{name}_token_id": ids(piece) for name, piece in names.items()}
    write_checkpoint(model_dir, {**PREFIX, **keys, "vocab_size": 1024})
    return model_dir


@pytest.mark.parametrize("model", ["demo", "prefix LM"])
def test_a_text_is_scored_as_by_the_undivided_model(model: str, tmp_path: Path) -> None:
    """The command's figures and each token's log-probability, over two stages and several windows."""
    model_dir = demo_model_dir() if model == "demo" else prefix_lm_dir(tmp_path / "model")
    text = "".join(f"{question}\n" for question in QUESTIONS) * 3
    (tmp_path / "text").write_text(text, encoding="utf-8")
    words = ("score", "--model", model_dir, "--text", tmp_path / "text", "--window", "100", "--stride", "40", *SPLIT)
    code, out, err = glmpipe(*words, "--json", "--tokens", tmp_path / "tokens")
    assert code == 0, err
    score = json.loads(out)
    config = load_config(model_dir)
    tokenizer = load_tokenizer(model_dir, config)
    ids, prefix = tokenizer.encode(text), tokenizer.encode_prompt("")
    tokens = [json.loads(line) for line in (tmp_path / "tokens").read_text(encoding="utf-8").splitlines()]
    assert [each["token_id"] for each in tokens] == ids
    assert (score["tokens"], score["scored_tokens"], score["bytes"]) == (len(ids), len(ids), len(text.encode()))
    assert score["windows"] > 1
    assert score["logprob"] == pytest.approx(sum(each["logprob"] for each in tokens))
    undivided = Model.load(Checkpoint(model_dir), config)
    for each in tokens[::7]:
        start = each["position"] + len(prefix) - each["context_tokens"]
        fed = [*prefix, *ids[start : each["position"]]]
        segment = Segment(undivided.layers.new_cache(), 0, len(fed), prompt_layout(prefix, config))
        hidden = undivided.layers.forward(undivided.embedding.forward(torch.tensor(fed)), [segment])
        expected = float(undivided.head.forward(hidden[-1:]).double().log_softmax(-1)[0, each["token_id"]])
        assert each["logprob"] == pytest.approx(expected, abs=1e-4)
    code, out, _ = glmpipe(*words)
    assert f"perplexity       {score['perplexity']:.4f}\n" in out
