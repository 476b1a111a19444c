"""The surface of a question: politeness, case, punctuation, spaces, a slip of the finger; its meaning stays."""

import random
import re

_EN_OPENERS = (
    "Please ",
    "Hi, ",
    "Hello! ",
    "Hey, ",
    "Ok, ",
    "So, ",
    "Well, ",
    "Um, ",
    "And ",
    "Now, ",
    "Tell me: ",
    "Question: ",
    "Sorry, ",
    "Thanks! ",
    "Good. ",
    "Hi there! ",
    "One more: ",
)
_EN_CLOSERS = (
    " please",
    " thanks",
    ", please",
    " then",
    " now",
    " exactly",
    " again",
    ", thank you",
    " today",
    " really",
)
_ZH_OPENERS = (
    "请问",
    "请问，",
    "你好，",
    "那",
    "麻烦问一下，",
    "我想问",
    "我想知道",
    "请告诉我",
    "嗯，",
    "好的，",
    "另外，",
    "问一下，",
    "你好！",
    "谢谢。",
    "对了，",
    "那么，",
    "您好，",
)
_ZH_CLOSERS = ("呢", "啊", "呀", "，谢谢", "谢谢", "嘛", "吗", "哦")
_EN_SHORT = (
    ("What is ", "What's "),
    ("what is ", "what's "),
    ("What is ", "Whats "),
    ("do not", "don't"),
    ("I am", "I'm"),
    ("cannot", "can't"),
    ("does not", "doesn't"),
    ("What's ", "What is "),
    ("I would", "I'd"),
    ("going to", "gonna"),
    ("you", "u"),
)
_END = re.compile(r"[?.!。？！]+$")


def vary(rng: random.Random, language: str, question: str) -> str:
    """The same question as another person might type it."""
    asks = question.endswith(("?", "？"))
    openers, closers = (_EN_OPENERS, _EN_CLOSERS) if language == "en" else (_ZH_OPENERS, _ZH_CLOSERS)
    if asks and rng.random() < 0.06:
        question = _END.sub("", question) + rng.choice(closers) + ("?" if language == "en" else "？")
    if asks and rng.random() < 0.15:
        opener = rng.choice(openers)
        question = opener + (question[0].lower() + question[1:] if rng.random() < 0.6 else question)
    if language == "en":
        question = _vary_english(rng, question)
    elif rng.random() < 0.4:
        question = re.sub(r"(?<=[一-鿿]) | (?=[一-鿿])", "", question)
    question = _vary_punctuation(rng, language, question)
    if rng.random() < 0.05:
        question = _slip(rng, question)
    return question.strip() or "?"


def _vary_english(rng: random.Random, question: str) -> str:
    if rng.random() < 0.3:
        old, new = rng.choice(_EN_SHORT)
        question = question.replace(old, new)
    pick = rng.random()
    if pick < 0.35:
        return question.lower()
    return question.upper() if pick < 0.39 else question


def _vary_punctuation(rng: random.Random, language: str, question: str) -> str:
    pick = rng.random()
    if pick < 0.33 and len(_END.sub("", question)) > 0:
        return _END.sub("", question)
    if pick < 0.43:
        return _END.sub("", question) + rng.choice(["?", "!", ".", "??", " ?", "...", "!!", "？", "。", "！"])
    if language == "zh" and pick < 0.58:
        return question.translate(str.maketrans("？！，。：", "?!,.:"))
    return question


def _slip(rng: random.Random, question: str) -> str:
    """One character lost, doubled or swapped with the next; numbers are left alone."""
    if len(question) < 6 or any(character.isdigit() for character in question):
        return question
    at = rng.randrange(len(question) - 1)
    middle = rng.choice(["", question[at] * 2 + question[at + 1], question[at + 1] + question[at]])
    return question[:at] + (middle or question[at + 1]) + question[at + 2 :]
