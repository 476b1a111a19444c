"""What makes a model answer as it does: its files, its precisions, its chat format, and not where it runs."""

import json
from pathlib import Path

import pytest

from coordinator import chat_model
from coordinator.cli import main
from coordinator.model_identity import identity_of, precision_text
from coordinator.model_text import read_model_text
from coordinator.plan import EndsPlan, Plan, StagePlan
from glm.config import load_config
from glm.model_source import open_checkpoint
from tests.tiny_checkpoints import CAUSAL, write_checkpoint
from tests.tiny_tokenizers import train_chatglm2

ENDS = EndsPlan("cpu", "fp32", "cpu", "cpu", "int8")


def test_the_same_precisions_have_one_text_however_layers_are_dealt_out() -> None:
    """Stages and devices do not matter; which layers are held at which precision does."""
    whole = Plan((StagePlan("cpu", 0, 4, "int8"),), ENDS)
    halves = Plan((StagePlan("cpu", 0, 1, "int8"), StagePlan("cuda:0", 1, 4, "int8", host="lab2")), ENDS)
    mixed = Plan((StagePlan("cpu", 0, 1, "int8"), StagePlan("cpu", 1, 2, "int8"), StagePlan("cpu", 2, 4, "fp32")), ENDS)
    assert (
        precision_text(whole) == precision_text(halves) == "int8, embeddings fp32, final_layernorm fp32, lm_head int8"
    )
    assert precision_text(mixed).startswith("int8 1-2, fp32 3-4, embeddings fp32")


def test_a_file_of_answers_is_not_gone_on_with_by_another_model_and_nothing_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another precision, other weights, another chat format: each by its name, before a worker starts."""
    model_dir, prompts, out = tmp_path / "model", tmp_path / "prompts", tmp_path / "out"
    config = write_checkpoint(model_dir, {**CAUSAL, "padded_vocab_size": 4096})
    train_chatglm2(model_dir)
    prompts.write_text('{"prompt": "a", "max_new_tokens": 2, "greedy": true}\n')
    command = ["generate", "--prompts", str(prompts), "--out", str(out), "--model", str(model_dir)]
    assert main(command) == 0
    first = json.loads(out.read_text())["model"]
    plan = Plan((StagePlan("cpu", 0, 4, "fp32"),), EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32"))
    text, prints = read_model_text(model_dir, load_config(model_dir)), open_checkpoint(model_dir).fingerprint()
    assert first == identity_of(model_dir, config, plan, text, prints).as_json()
    prompts.write_text(prompts.read_text() + '{"prompt": "b", "max_new_tokens": 2, "greedy": true}\n')
    monkeypatch.setattr(chat_model, "Cluster", lambda *_: pytest.fail("a worker was started"))
    for words, said in (
        (
            ["--cpu-precision", "int8"],
            "(precision int8, embeddings fp32, final_layernorm fp32, lm_head int8 instead of",
        ),
        (["--chat-format", "chatglm3"], "(chat format chatglm3 instead of chatglm2)"),
    ):
        assert main([*command, *words]) == 2
        assert said in capsys.readouterr().err
    write_checkpoint(model_dir, {**CAUSAL, "padded_vocab_size": 4096}, seed=1)
    assert main(command) == 2
    assert f" instead of {first['fingerprint']})" in capsys.readouterr().err
