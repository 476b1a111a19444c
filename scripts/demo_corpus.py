"""The demo model's corpus: short conversations in English and Chinese, made from the word lists in `demo_data/`.

Nothing here knows tokens or tensors. `conversations(seed, count)` gives the same conversations for the same seed. A
conversation is a few *scenes* (a subject asked about, a chain of capitals, a name told and asked for, ...), and every
question is worded and typed as different people would (`demo_wording`).
"""

import random
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from demo_wording import vary

DATA_DIR = Path(__file__).resolve().parent / "demo_data"
LANGUAGES = ("en", "zh")
MAX_NUMBER = 20
SWITCH_LANGUAGE = 0.12
NOT_SUBJECTS = ("frames", "unknown", "unknown_capital", "sum_too_big", "count_too_far", "name_unknown")


@dataclass(frozen=True, slots=True)
class Turn:
    question: str
    answer: str
    is_varied: bool = True


Scene = list[Turn]


@cache
def _toml(name: str) -> dict[str, Any]:
    with (DATA_DIR / name).open("rb") as file:
        return tomllib.load(file)


def subjects(language: str) -> dict[str, Any]:
    """Subject name -> its table (`say` and the lists of questions), without the frames and the skills' refusals."""
    return {name: table for name, table in _toml(f"{language}.toml").items() if name not in NOT_SUBJECTS}


def skills(language: str) -> dict[str, Any]:
    return dict(_toml("skills.toml")[language])


def countries(language: str) -> list[tuple[list[str], str]]:
    """(names of the country, the first one used in answers; its capital)."""
    at = 0 if language == "en" else 2
    return [(row[at].split("/"), row[at + 1]) for row in _toml("capitals.toml")["countries"]]


def _places_known(language: str) -> list[str]:
    """All names of countries and their capitals."""
    return [name for names, capital in countries(language) for name in (*names, capital)]


def _say(language: str, name: str) -> str:
    return str(_toml(f"{language}.toml")[name]["say"])


# --- scenes: each takes (rng, language) and gives one or more turns ---


def _frame(rng: random.Random, language: str, kind: str, filling: str) -> str:
    return str(rng.choice(_toml(f"{language}.toml")["frames"][kind])).format(filling)


def subject_question(rng: random.Random, language: str, table: dict[str, Any]) -> str:
    """One question about a subject: a whole one, or a frame filled with one of its names or actions."""
    weights = {
        "ask": len(table.get("ask", ())),
        **{kind: 2 * len(table.get(kind, ())) for kind in ("what", "how", "can")},
    }
    kind = rng.choices(list(weights), list(weights.values()))[0]
    filling = rng.choice(table[kind])
    return str(filling) if kind == "ask" else _frame(rng, language, kind, filling)


def subject(rng: random.Random, language: str) -> Scene:
    table = rng.choice(list(subjects(language).values()))
    return [Turn(subject_question(rng, language, table), table["say"])]


def unknown(rng: random.Random, language: str) -> Scene:
    table = _toml(f"{language}.toml")["unknown"]
    kind = rng.choices(["ask", "topic", "country", "what", "action", "nonsense", "noise"], [32, 22, 8, 10, 13, 10, 5])[
        0
    ]
    if kind == "ask":
        question = rng.choice(table["ask"])
    elif kind == "country":
        question = rng.choice(table["country_frames"]).format(rng.choice(_places_known(language)))
    elif kind == "topic":
        question = rng.choice(table["frames"]).format(rng.choice(table["topics"]))
    elif kind == "what":
        question = _frame(rng, language, "what", rng.choice(table["topics"]))
    elif kind == "action":
        question = _frame(rng, language, rng.choice(["how", "can"]), rng.choice(table["actions"]))
    elif kind == "nonsense":
        frames = table["frames"] + _toml(f"{language}.toml")["frames"]["what"]
        question = rng.choice(frames).format(_nonsense(rng, language))
    else:
        question = "".join(
            chr(rng.choice([rng.randint(0x1F300, 0x1F5FF), rng.randint(0xA1, 0x2AF)])) for _ in range(rng.randint(1, 4))
        )
    return [Turn(question, table["say"])]


def _nonsense(rng: random.Random, language: str) -> str:
    if language == "zh":
        return "".join(chr(rng.randint(0x4E00, 0x9F00)) for _ in range(rng.randint(1, 3)))
    syllables = [
        "".join(rng.choice(part) for part in ("bcdfghjklmnprstvwz", "aeiou", "bdklmnrst ".strip()))
        for _ in range(rng.randint(1, 3))
    ]
    return "".join(syllables)


def unknown_capital(rng: random.Random, language: str) -> Scene:
    place = (
        rng.choice(_toml(f"{language}.toml")["unknown"]["places"]) if rng.random() < 0.7 else _nonsense(rng, language)
    )
    place = place.capitalize() if rng.random() < 0.5 else place
    return [Turn(rng.choice(skills(language)["capital_ask"]).format(c=place), _say(language, "unknown_capital"))]


def capitals(rng: random.Random, language: str) -> Scene:
    """A capital asked for, perhaps followed by "and of Japan?"; or the country of a capital."""
    words = skills(language)
    turns = []
    for index in range(rng.choice([1, 1, 2, 3])):
        names, capital = rng.choice(countries(language))
        answer = words["capital_say"].format(c=names[0], k=capital)
        asks = words["capital_next"] if index and rng.random() < 0.8 else words["capital_ask"]
        if not index and rng.random() < 0.06:
            asks = words["capital_next"]
        if rng.random() < 0.22:
            asks, answer = words["country_ask"], words["country_say"].format(c=names[0], k=capital)
        turns.append(Turn(rng.choice(asks).format(c=rng.choice(names), k=capital), answer))
    return turns


def _number(rng: random.Random, language: str, value: int, as_word: bool) -> str:
    if not as_word:
        return str(value)
    if language == "zh" and value == 2 and rng.random() < 0.3:
        return "两"
    return str(skills(language)["numbers"][value])


def sums(rng: random.Random, language: str) -> Scene:
    words = skills(language)
    turns = []
    for index in range(rng.choice([1, 1, 2, 3])):
        a, b = rng.randint(0, MAX_NUMBER), rng.randint(0, MAX_NUMBER)
        as_word = rng.random() < 0.3
        asks = words["sum_next"] if index and rng.random() < 0.7 else words["sum_ask"]
        question = rng.choice(asks).format(a=_number(rng, language, a, as_word), b=_number(rng, language, b, as_word))
        turns.append(Turn(question, words["sum_say"].format(a=a, b=b, s=a + b)))
    return turns


def sum_too_big(rng: random.Random, language: str) -> Scene:
    pair = [
        rng.randint(0, 999) if rng.random() < 0.5 else rng.randint(0, 99),
        rng.choice([rng.randint(21, 99), rng.randint(100, 9999)]),
    ]
    rng.shuffle(pair)
    return [Turn(rng.choice(skills(language)["sum_ask"]).format(a=pair[0], b=pair[1]), _say(language, "sum_too_big"))]


def count(rng: random.Random, language: str) -> Scene:
    """Count up to a number, between two or back; perhaps then "and backwards?" or "and to ten?"."""
    words = skills(language)
    kind = rng.choices(["up", "range", "back", "far"], [5, 3, 4, 1])[0]
    if kind == "far":
        return [
            Turn(
                rng.choice(words["count_ask"]).format(
                    b=rng.choice([rng.randint(21, 99), rng.randint(100, 1000), 1000000])
                ),
                _say(language, "count_too_far"),
            )
        ]
    start, end = (1, rng.randint(2, MAX_NUMBER)) if kind != "range" else sorted(rng.sample(range(MAX_NUMBER + 1), 2))
    as_word = rng.random() < 0.5
    shown = {"a": _number(rng, language, start, as_word), "b": _number(rng, language, end, as_word)}
    asks = {"up": "count_ask", "range": "range_ask", "back": "back_ask"}[kind]
    turns = [Turn(rng.choice(words[asks]).format(**shown), _counted(language, start, end, kind == "back"))]
    if kind != "back" and rng.random() < 0.35:
        turns.append(Turn(rng.choice(words["back_next"]), _counted(language, start, end, True)))
    elif rng.random() < 0.25:
        end = rng.randint(2, MAX_NUMBER)
        shown_end = _number(rng, language, end, as_word)
        turns.append(Turn(rng.choice(words["count_next"]).format(b=shown_end), _counted(language, 1, end, False)))
    return turns


def _counted(language: str, start: int, end: int, back: bool) -> str:
    words = skills(language)
    numbers = list(range(start, end + 1))
    numbers = numbers[::-1] if back else numbers
    return str(words["count_say"].format(a=numbers[0], b=numbers[-1], list=words["comma"].join(map(str, numbers))))


def neighbours(rng: random.Random, language: str) -> Scene:
    """The number after or before another one, or the bigger one of two."""
    words = skills(language)
    kind = rng.choice(["after", "before", "bigger"])
    a, b = rng.sample(range(1, MAX_NUMBER), 2)
    as_word = rng.random() < 0.3
    question = rng.choice(words[f"{kind}_ask"]).format(
        a=_number(rng, language, a, as_word), b=_number(rng, language, b, as_word)
    )
    if kind == "bigger":
        return [Turn(question, words["bigger_say"].format(a=max(a, b), b=min(a, b)))]
    return [Turn(question, words[f"{kind}_say"].format(a=a, s=a + 1 if kind == "after" else a - 1))]


def names(rng: random.Random, language: str) -> Scene:
    """A name is told, something else may be talked about, then the name is asked for."""
    words = skills(language)
    ask_name = _toml(f"{language}.toml")["name_unknown"]["ask"]
    if rng.random() < 0.25:
        return [Turn(rng.choice(ask_name), _say(language, "name_unknown"))]
    name = rng.choice(words["names"]) if rng.random() < 0.5 else _made_up_name(rng, language)
    name = name.lower() if rng.random() < 0.25 else name
    told = rng.choice(words["name_ask"]).format(n=name)
    turns = [Turn(told.lower() if name.islower() else told, words["name_say"].format(n=name), is_varied=False)]
    turns += [
        turn
        for _ in range(rng.choice([0, 0, 1, 2]))
        for turn in rng.choice([subject, sums, capitals])(rng, language)[:1]
    ]
    return [*turns, Turn(rng.choice(ask_name), words["name_known"].format(n=name))]


def _made_up_name(rng: random.Random, language: str) -> str:
    """So that names are copied, not remembered."""
    if language == "en":
        return _nonsense(rng, language).capitalize()
    characters = "".join(skills(language)["names"])
    return "".join(rng.choice(characters) for _ in range(rng.choice([2, 2, 3])))


SCENES: dict[Callable[[random.Random, str], Scene], float] = {
    subject: 54,
    unknown: 13,
    unknown_capital: 2,
    capitals: 9,
    sums: 8,
    sum_too_big: 1.5,
    count: 7,
    neighbours: 1.5,
    names: 6,
}

# --- conversations ---


def conversation(rng: random.Random) -> list[Turn]:
    language = rng.choice(LANGUAGES)
    turns: list[Turn] = []
    for _ in range(rng.choices([1, 2, 3], [5, 4, 2])[0]):
        if rng.random() < SWITCH_LANGUAGE:
            language = rng.choice(LANGUAGES)
        scene = rng.choices(list(SCENES), list(SCENES.values()))[0](rng, language)
        turns += [Turn(vary(rng, language, turn.question), turn.answer) if turn.is_varied else turn for turn in scene]
    return turns


def conversations(seed: int, count: int) -> Iterator[list[Turn]]:
    """`count` conversations, the same ones for the same seed."""
    rng = random.Random(seed)
    return (conversation(rng) for _ in range(count))
