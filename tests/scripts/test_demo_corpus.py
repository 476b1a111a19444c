"""The demo model's corpus and tokenizer can be made again, and its training reads chats as `glm` encodes them."""

import sys
from itertools import islice
from pathlib import Path

import pytest

from glm.chat_format import ChatMessage, chat_format_for
from glm.config import load_config
from glm.demo import demo_model_dir
from glm.tokenizer import load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import demo_corpus  # noqa: E402
import train_demo  # noqa: E402


def test_same_seed_same_corpus() -> None:
    """A seed fixes every conversation; another seed gives others."""
    first, again = (list(demo_corpus.conversations(5, 200)) for _ in range(2))
    assert first == again
    assert first != list(demo_corpus.conversations(6, 200))


def test_languages_have_the_same_subjects() -> None:
    """What can be talked about in English can be talked about in Chinese."""
    english, chinese = (demo_corpus.subjects(language) for language in demo_corpus.LANGUAGES)
    assert english.keys() == chinese.keys()
    assert demo_corpus.skills("en").keys() == demo_corpus.skills("zh").keys()


@pytest.mark.slow
def test_tokenizer_is_made_from_the_corpus() -> None:
    """Training the tokenizer again gives the pieces of the one in the package."""
    import sentencepiece

    shipped = sentencepiece.SentencePieceProcessor(model_file=str(demo_model_dir() / "tokenizer.model"))
    again = sentencepiece.SentencePieceProcessor(model_proto=train_demo.train_tokenizer())
    assert [again.id_to_piece(i) for i in range(again.vocab_size())] == [
        shipped.id_to_piece(i) for i in range(shipped.vocab_size())
    ]


def test_training_reads_chats_as_they_are_served() -> None:
    """The ids trained on are those of the ChatGLM2 chat format, answers and later rounds included."""
    import sentencepiece

    config = load_config(demo_model_dir())
    chat_format = chat_format_for(load_tokenizer(demo_model_dir(), config))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(demo_model_dir() / "tokenizer.model"))
    for turns in islice(demo_corpus.conversations(7, 300), 300):
        *before, last = turns
        messages = [
            ChatMessage(role, text)
            for turn in before
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        served = chat_format.encode([*messages, ChatMessage("user", last.question)])
        trained = train_demo.example(processor, [*before, demo_corpus.Turn(last.question, "")]).token_ids
        assert trained == served
