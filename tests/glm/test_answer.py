"""Answers are cleaned up as published, whole or as a stream."""

from hypothesis import given
from hypothesis import strategies as st

from glm.answer import AnswerStream, clean_answer
from tests.glm.test_tokenizer_published import cases_of
from tests.tiny_tokenizers import tiny_config

ANSWERS = st.text(alphabet="中文ab1 \n,!:;?，[训练时间]", max_size=12) | st.just("[[训练时间]]")


def test_published_clean_up(shared_dir: object) -> None:
    """Every published case of ChatGLM-6B and ChatGLM2-6B."""
    del shared_dir
    for model, family in (("chatglm-6b", "chatglm"), ("chatglm2-6b", "chatglm2")):
        for case in cases_of(model)["process_response"]:
            assert clean_answer(tiny_config(family), case["raw"]) == case["processed"]


def test_other_layouts_are_only_stripped() -> None:
    """What transformers' layouts answer is shown as it is."""
    assert clean_answer(tiny_config("glm4"), "\n中文,[[训练时间]] ") == "中文,[[训练时间]]"


@given(parts=st.lists(ANSWERS, max_size=8), family=st.sampled_from(["chatglm", "chatglm2", "glm4"]))
def test_a_stream_shows_the_cleaned_answer(parts: list[str], family: str) -> None:
    """Cut anywhere, the stream's parts make up exactly the cleaned whole."""
    config = tiny_config(family)
    stream = AnswerStream(config)
    assert "".join(map(stream.push, parts)) + stream.flush() == clean_answer(config, "".join(parts))


def test_a_stream_holds_back_little() -> None:
    """Words appear at once; only white space and an undecided mark wait for the next part."""
    stream = AnswerStream(tiny_config("chatglm"))
    parts = ["\n你", "好", ",", "a", ",", "b", " ", "c"]
    assert list(map(stream.push, parts)) == ["你", "好", "，", "a", "", ",b", "", " c"]
