"""The Python face: what people write is understood, or refused by one typed error, whoever they ask and from where."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import coordinator
from coordinator.chat_model import ChatModel, launch
from coordinator.client import RemoteBackend, connect
from coordinator.errors import ClosedError, CoordinatorError, PlanError, UsageError
from coordinator.history import messages_of
from coordinator.service import serve
from coordinator.talking import Talking
from glm.errors import GlmError
from protocol.client import ChatPrompt, Delta, Description, Finished, SamplingParams
from tests.coordinator.fake_backend import STATS

ASKED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]
DEFAULTS = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), None, False, False)


class Parrot(Talking):
    """Answers with these pieces, and keeps what it was asked."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.asked: list[tuple[Any, Any]] = []

    def describe(self) -> Description:
        return Description(0, "parrot", "chatglm2", 100, (), DEFAULTS, None)

    def stream(self, prompt: Any, sampling: Any = None) -> Iterator[Delta | Finished]:
        self.asked.append((prompt, sampling))
        for piece in self.pieces:
            yield Delta(1, piece, (5,))
        yield Finished(1, "stop", "".join(self.pieces), (5,) * len(self.pieces), STATS)


@pytest.mark.parametrize(
    ("history", "messages"),
    [
        (None, []),
        ([], []),
        (ASKED, ASKED),
        (tuple(ASKED), ASKED),
        (iter(ASKED), ASKED),
        ([("a", "b")], ASKED),
        ([["a", "b"]], ASKED),
        ([*ASKED, ("a", "b")], ASKED * 2),
        ([{"role": "assistant", "content": "x", "metadata": "tool"}],) * 2,
    ],
)
def test_a_history_may_be_written_in_many_ways(history: Any, messages: list[dict[str, Any]]) -> None:
    """As messages or as pairs; what comes back can be given again, and is a copy."""
    assert messages_of(history) == messages
    parrot = Parrot("c")
    reply, grown = parrot.chat("q", history if not isinstance(history, Iterator) else messages)
    assert reply == "c" and grown[-2:] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
    [(prompt, _)] = parrot.asked
    assert isinstance(prompt, ChatPrompt) and [turn.content for turn in prompt.turns] == [
        m["content"] for m in grown[:-1]
    ]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda model: model.chat(5), r"query is 5 \(int\); it must be a text"),
        (lambda model: model.chat(None), "query is None"),
        (lambda model: model.stream_chat("q", 5), r"history is 5 \(int\); it must be a list"),
        (lambda model: model.chat("q", "hello"), "history is 'hello'"),
        (lambda model: model.chat("q", ASKED[0]), "history is {'role'"),
        (lambda model: model.chat("q", [("a", "b"), ("a", "b", "c")]), "item 2 of history"),
        (lambda model: model.chat("q", ["a"]), "item 1 of history is 'a'"),
        (lambda model: model.chat("q", [("a", None)]), "the answer of item 1 of history is None"),
        (lambda model: model.chat("q", [("user", "a")]), 'write {"role": "user", "content": ...}'),
        (lambda model: model.chat("q", [{"role": "user"}]), "item 1 of history has no 'content'"),
        (lambda model: model.chat("q", [{"content": "x"}]), "item 1 of history has no 'role'"),
        (lambda model: model.chat("q", [{"role": "user", "content": 5}]), "content of item 1 of history is 5"),
        (lambda model: model.chat("q", [{**ASKED[0], "tool_calls": []}]), "item 1 of history has 'tool_calls'"),
        (lambda model: model.chat("q", [{**ASKED[0], "tools": 5}]), "tools must be a list"),
        (lambda model: model.chat("q", temprature=1), "temprature is no sampling param: did you mean temperature?"),
        (lambda model: model.chat("q", temperature="hot"), "temperature is 'hot'"),
        (lambda model: model.chat("q", stop=5), "stop is 5"),
        (lambda model: model.generate(5), "the prompt is a int; it must be a text, or a list of token ids"),
        (lambda model: model.generate([1.5]), "the prompt is a list"),
        (lambda model: model.generate(["a"]), "the prompt is a list"),
        (lambda model: model.generate({1: 2}), "the prompt is a dict"),
        (lambda model: model.generate(None), "the prompt is a NoneType"),
    ],
)
def test_what_cannot_be_meant_is_one_typed_error(ask: Callable[[Talking], object], words: str) -> None:
    """Said where it was asked, before anything is sent: what it is, and what it must be."""
    parrot = Parrot("x")
    with pytest.raises((CoordinatorError, GlmError)) as caught:
        ask(parrot)
    assert words.replace("\\", "") in str(caught.value)
    assert not parrot.asked


def test_texts_and_ids_are_both_continued() -> None:
    """`generate` takes a text as it is, and ids in whatever counts as a sequence of numbers; `stop` a text, too."""
    parrot = Parrot("x")
    for prompt in ("text", [1, 2], (1, 2), range(1, 3)):
        assert parrot.generate(prompt, stop="end").text == "x"
    prompts, params = zip(*parrot.asked, strict=True)
    assert prompts[0].text == "text" and all(prompt.token_ids == (1, 2) for prompt in prompts[1:])
    assert all(each.stop == ("end",) for each in params)


def test_a_stream_yields_when_its_text_has_grown() -> None:
    """Pieces without text, and the end, which brings nothing new, are not worth a look; an empty answer is one."""
    assert [text for text, _ in Parrot("", "a", "", "", "b", "").stream_chat("q")] == ["a", "ab"]
    assert [text for text, _ in Parrot("", "").stream_chat("q")] == [""]


def test_the_public_names_are_shown() -> None:
    """By `dir`, and each is there."""
    assert set(coordinator.__all__) <= set(dir(coordinator))
    assert {"launch", "connect", "ChatModel"} <= set(coordinator.__all__)
    assert all(hasattr(coordinator, name) for name in coordinator.__all__)
    with pytest.raises(AttributeError):
        coordinator.lunch  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plan": 5}, "plan is a int"),
        ({"plan": "a\0b"}, "no file has such a name"),
        ({"plan": {}}, "no stage"),
        ({"plan": {"stage": [{"device": "cpu", "layers": "1-4"}]}}, "layer"),
        ({"plan": {"stagge": []}}, "stagge"),
        ({"model": 5}, "model is a int"),
        ({"stages": "two"}, "stages is 'two'"),
        ({"stages": 99}, "stages 99: the model has 6 layers"),
        ({"layers": 5}, "layers is 5"),
        ({"layers": ["cpu"]}, "layers cpu: no '='"),
        ({"layers": []}, "layers is empty"),
        ({"layers": {"cpu": "1-4"}}, "layer"),
        ({"layers": ["cpu=1-6"], "stages": 2}, "layers and stages are given"),
        ({"plan": "plan.toml", "stages": 2}, "plan and stages are given"),
    ],
)
def test_a_wrong_wish_for_a_launch_is_one_typed_error(arguments: dict[str, Any], words: str) -> None:
    """Before anything is started."""
    with pytest.raises((UsageError, PlanError)) as caught:
        launch(**arguments)
    assert words in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "num_stages"),
    [
        ({"plan": {"stage": [{"device": "cpu", "layers": "1-2"}, {"device": "cpu", "layers": "3-6"}]}}, 2),
        ({"layers": ["cpu=1-2", "cpu=3-6"]}, 2),
        ({"layers": {"cpu": "1-6"}}, 1),
        ({"stages": 2}, 2),
    ],
)
def test_a_launch_says_where_its_layers_go(arguments: dict[str, Any], num_stages: int) -> None:
    """By a dict as a plan file holds, by the command line's words, by a number."""
    with launch(None, **arguments) as model:
        assert len(model.cluster.plan.stages) == num_stages
        assert model.generate([5, 9], max_new_tokens=1).token_ids


QUESTIONS = ["你好", "What is 17 + 15?", "日本的首都是哪里？", "What is a stage worker?"]


@pytest.fixture(scope="module")
def demo() -> Iterator[ChatModel]:
    with launch() as model:
        yield model


def answers(model: Talking) -> list[str]:
    return [model.chat(question, greedy=True, max_new_tokens=12)[0] for question in QUESTIONS]


def in_threads(model: Talking) -> list[str]:
    """Each question from a thread of its own, at the same time, streamed."""
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        return list(pool.map(lambda question: model.chat(question, greedy=True, max_new_tokens=12)[0], QUESTIONS))


@pytest.mark.slow
def test_threads_and_tasks_ask_one_model_at_once(demo: ChatModel) -> None:
    """Each has the answer that it has alone; two streams read in turns in one thread do, too."""
    alone = answers(demo)

    async def gather() -> list[str]:
        asked = (asyncio.to_thread(demo.chat, each, greedy=True, max_new_tokens=12) for each in QUESTIONS)
        return [reply for reply, _ in await asyncio.gather(*asked)]

    assert in_threads(demo) == alone
    assert asyncio.run(gather()) == alone
    streams = [demo.stream_chat(each, greedy=True, max_new_tokens=12) for each in QUESTIONS[:2]]
    last = ["", ""]
    while streams_left := [at for at, stream in enumerate(streams) if stream is not None]:
        for at in streams_left:
            found = next(streams[at], None)
            last[at] = last[at] if found is None else found[0]
            if found is None:
                streams[at] = None  # type: ignore[call-overload]
    assert last == alone[:2]


@pytest.mark.slow
def test_threads_ask_a_running_launch_at_once(demo: ChatModel, tmp_path: Path) -> None:
    """As a model of one's own, over one connection; and what was closed says so."""
    alone, endpoint, is_over = answers(demo), f"ipc://{tmp_path}/launch", threading.Event()
    serving = threading.Thread(target=serve, args=(demo, endpoint, is_over.is_set))
    serving.start()
    try:
        with connect(endpoint) as remote:
            assert answers(remote) == alone
            assert in_threads(remote) == alone
            assert remote.generate("hello", max_new_tokens=3).token_ids
        for ask in (lambda: remote.chat("q"), lambda: remote.generate([1]), lambda: next(remote.stream_chat("q"))):
            with pytest.raises(ClosedError, match="was closed: connect again"):
                ask()
        remote.close()
    finally:
        is_over.set()
        serving.join()
    assert isinstance(remote, RemoteBackend)


@pytest.mark.slow
def test_a_closed_model_says_so() -> None:
    """Whatever it is asked, and whoever is in the middle of an answer; closing it twice is fine."""
    model = launch()
    middle = model.stream_chat("你好", ignore_eos=True)
    next(middle)
    found: list[BaseException] = []
    begun = threading.Event()

    def ask() -> None:
        try:
            for _ in model.stream_chat("你好", ignore_eos=True):
                begun.set()
        except BaseException as error:
            found.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(60)
    model.close()
    asking.join(60)
    model.close()
    assert [type(error) for error in found] == [ClosedError]
    for say in (
        lambda: next(middle),
        lambda: model.chat("q"),
        lambda: model.generate("q"),
        lambda: model.score([1, 2]),
        lambda: next(model.stream_chat("q")),
    ):
        with pytest.raises(ClosedError, match="closed"):
            say()
