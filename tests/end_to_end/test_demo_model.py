"""The demo model answers its fixed questions, however it is split and at every precision."""

import json
from pathlib import Path

import pytest

from coordinator.chat_model import launch
from coordinator.engine import Engine
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.plan_request import Option, PlanRequest
from coordinator.planning import even_split, resolve
from coordinator.scheduler import SchedulerSettings
from coordinator.sequence import Sequence
from glm.chat_format import ChatMessage, chat_format_for
from glm.checkpoint import Checkpoint
from glm.config import ModelConfig, load_config
from glm.demo import demo_model_dir
from glm.ends import Embedding, Head, end_placement
from glm.model import LayerStack
from glm.precision import Precision
from glm.sampling import Sampler, SamplingParams
from glm.tokenizer import Tokenizer, load_tokenizer
from glm.weights import Placement
from stage_worker.stage import Stage
from tests.in_process import CPU, InProcessPipeline

QUESTIONS = json.loads((Path(__file__).parent / "demo_questions.json").read_text(encoding="utf-8"))
EOS = 2
MAX_BYTES = 8_000_000


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_config(demo_model_dir())


@pytest.fixture(scope="module")
def tokenizer(config: ModelConfig) -> Tokenizer:
    return load_tokenizer(demo_model_dir(), config)


def ends_beside(precision: Precision, config: ModelConfig) -> list[Placement]:
    """Where a plan puts embeddings, final norm and lm_head when all layers have this precision."""
    ends = resolve(PlanRequest(cpu_precision=Option("cpu_precision", precision)), config.num_layers, ["cpu"]).ends
    chosen = (ends.embedding_precision, ends.final_layernorm_precision, ends.lm_head_precision)
    return [end_placement(Precision.parse(text), CPU, config) for text in chosen]


def engine_for(config: ModelConfig, precision: Precision, num_stages: int) -> Engine:
    """Stages of equal size in this process, the ends at the precisions that plans give them beside such layers."""
    checkpoint = Checkpoint(demo_model_dir())
    table, norm, lm_head = ends_beside(precision, config)
    ranges = even_split(config.num_layers, num_stages)
    stages = [Stage(LayerStack.load(checkpoint, config, *layers, precision, CPU), 100_000) for layers in ranges]
    embedding = Embedding.load(checkpoint, config, table, lm_head)
    head = Head.load(checkpoint, config, norm, lm_head, embedding)
    return Engine(embedding, head, InProcessPipeline(stages), SchedulerSettings(100_000))  # type: ignore[arg-type]


def answers(engine: Engine, tokenizer: Tokenizer, config: ModelConfig, chats: list[list[ChatMessage]]) -> list[str]:
    """The greedy answers to several conversations, generated together; every one must end by itself."""
    sequences = []
    for chat in chats:
        prompt_ids = chat_format_for(tokenizer).encode(chat)
        sampler = Sampler(SamplingParams(greedy=True), prompt_ids)
        sequence = Sequence(
            engine.new_sequence_id(),
            prompt_ids,
            sampler,
            layout=None,
            end_ids=frozenset({EOS}),
            max_new_tokens=100,
            max_length=config.max_context,
            max_context=config.max_context,
        )
        engine.add(sequence)
        sequences.append(sequence)
    while not engine.is_idle:
        engine.step()
    assert [sequence.finish_reason for sequence in sequences] == ["stop"] * len(sequences)
    return [tokenizer.decode(sequence.new_ids[:-1]).strip() for sequence in sequences]


def last_answers(engine: Engine, tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """The last answer of every fixed conversation, the earlier turns answered by the model itself."""
    chats: list[list[ChatMessage]] = [[] for _ in QUESTIONS]
    for turn in range(max(len(question["turns"]) for question in QUESTIONS)):
        asked = [index for index, question in enumerate(QUESTIONS) if turn < len(question["turns"])]
        for index in asked:
            chats[index].append(ChatMessage("user", QUESTIONS[index]["turns"][turn]))
        for index, text in zip(
            asked, answers(engine, tokenizer, config, [chats[index] for index in asked]), strict=True
        ):
            chats[index].append(ChatMessage("assistant", text))
    return [chat[-1].content for chat in chats]


def wrong_answers(given: list[str]) -> list[str]:
    return [
        f"{question['turns']} -> {answer}"
        for question, answer in zip(QUESTIONS, given, strict=True)
        if question["expect"] not in answer
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.INT8])
def test_every_answer_is_right(
    config: ModelConfig, tokenizer: Tokenizer, precision: Precision, num_stages: int
) -> None:
    """All fixed questions are answered rightly in fp32, bf16 and int8, over one, two and three stages."""
    assert wrong_answers(last_answers(engine_for(config, precision, num_stages), tokenizer, config)) == []


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_int4_answers_nine_of_ten(config: ModelConfig, tokenizer: Tokenizer, num_stages: int) -> None:
    """At least 90% of the fixed questions are answered rightly in int4."""
    wrong = wrong_answers(last_answers(engine_for(config, Precision.INT4, num_stages), tokenizer, config))
    assert len(wrong) <= 0.1 * len(QUESTIONS), wrong


@pytest.mark.slow
def test_worker_processes_answer_rightly() -> None:
    """Three real workers, each at its own precision, answer every fixed question through the Python interface."""
    stages = tuple(
        StagePlan("cpu", 2 * index, 2 * index + 2, precision, num_threads=1)
        for index, precision in enumerate(["fp32", "int8", "bf16"])
    )
    plan = Plan(stages, EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32"))
    given = []
    with launch(None, plan) as chat_model:
        for question in QUESTIONS:
            history: list[dict[str, str]] = []
            for query in question["turns"]:
                reply, history = chat_model.chat(query, history, greedy=True)
            given.append(reply)
    assert wrong_answers(given) == []


def test_demo_model_is_small_and_whole(config: ModelConfig) -> None:
    """The package carries one small ChatGLM2-layout checkpoint, with as many layers as `make chat` splits."""
    files = sorted(demo_model_dir().iterdir())
    assert [file.name for file in files] == [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert (config.family, config.num_layers) == ("chatglm2", 6)
