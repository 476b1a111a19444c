"""How a command line is refused: what is wrong, what may have been meant, and one line of usage instead of a page."""

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn

EXIT_USAGE = 2
_TAKES_NO_VALUE = (0, "?", "*")
_PLAINER = {
    r"^argument (--[\w-]+)\S*: expected one argument$": r"\1 needs a value (one that begins with a dash: \1=VALUE)",
    r"^argument (\S+): invalid int value: (.*)$": r"\1 \2 is not a whole number",
    r"^argument (\S+): invalid float value: (.*)$": r"\1 \2 is not a number",
    r"^argument (-\S+): ": r"\1: ",
    r"^the following arguments are required: (.*)$": r"\1 is missing",
    r"^one of the arguments (.*) is required$": r"nothing was asked for; give one of \1",
}
"""What argparse says, in words for people."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose descriptions keep their line breaks, and which takes no abbreviations.

    An unknown option or word is told by the parser of the subcommand it was given to, before anything that is missing.
    """

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)
        self.neighbours: Mapping[str, argparse.ArgumentParser] = {}
        """Other commands by their names: an option of theirs, given here, is told as theirs."""

    def parse_known_args(  # type: ignore[override] # all that argparse calls
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As usual, but nothing is left unknown."""
        words = list(sys.argv[1:] if args is None else args)
        if not {"-h", "--help"}.isdisjoint(words):
            if self._subparsers is None:  # whatever else is wrong
                self.print_help()
                self.exit()
            return super().parse_known_args(words, namespace)
        words = self._words_first(words)
        unknown = tuple(dict.fromkeys(self._unknown_options(words)))
        if unknown:
            told = ", ".join(f"{name}{self._meant(name)}" for name in unknown)
            self.error(f"unknown option{'s' * (len(unknown) > 1)} {told}")
        takes_words = any(not action.option_strings for action in self._actions)
        stray = None if takes_words else next((words[place] for place in self._stray_words(words)), None)
        if stray is not None:
            has_prompt = "--prompt" in self._option_string_actions
            hint = f"; a question goes behind --prompt: --prompt {stray!r}" if has_prompt else ""
            self.error(f"nothing can be done here with {stray!r}{hint}")
        known, left = super().parse_known_args(words, namespace)
        if left:
            self.error(f"nothing can be done here with {' '.join(map(repr, left))}")
        return known, left

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        for pattern, plain in _PLAINER.items():
            message = re.sub(pattern, plain, message)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n{self._short_usage()}\n")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """What names something is not empty: an unset variable in a script is no wish for the default."""
        names_something = action.nargs != argparse.PARSER and "TEXT" not in str(action.metavar)
        if names_something and not arg_string.strip() and arg_string != action.const:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            remedy = "give it a value" if action.required else "give it a value, or leave it out"
            raise argparse.ArgumentError(None, f"{name} is empty; {remedy}")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        name = "/".join(action.option_strings) or action.metavar or action.dest
        choices = tuple(map(str, action.choices))
        raise argparse.ArgumentError(
            None,
            f"{str(name).lower()} {value!r} is unknown{_question(nearest(str(value), choices))}: {_any_of(choices)}",
        )

    def _unknown_options(self, words: Sequence[str]) -> Iterator[str]:
        """Options among the words that this parser does not have; the words of its subcommands are left to these."""
        known = self._option_string_actions
        for before, word in pairwise(["", *words]):
            if before in known and known[before].nargs not in _TAKES_NO_VALUE:
                continue
            name = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return
            if re.fullmatch(r"-[^\d. ]\S*", name) and name not in known and (name[1] == "-" or name[:2] not in known):
                yield name

    def _words_first(self, words: Sequence[str]) -> list[str]:
        """With what is not an option's before all options: argparse finds an optional word there only."""
        if self._subparsers is not None or "--" in words:
            return list(words)
        places = list(self._stray_words(words))
        return [words[place] for place in places] + [each for place, each in enumerate(words) if place not in places]

    def _stray_words(self, words: Sequence[str]) -> Iterator[int]:
        """The places of words that are neither options nor values."""
        known = self._option_string_actions
        for place, (before, word) in enumerate(pairwise(["", *words])):
            takes_values = before in known and known[before].nargs != 0
            if not takes_values and not word.startswith("-"):
                yield place

    def _meant(self, name: str) -> str:
        others = [command for command, parser in self.neighbours.items() if name in parser._option_string_actions]
        if others and self.prog.split()[-1] not in others:
            return f" (an option of {self.prog.split()[0]} {others[0]})"
        return _question(nearest(name, [option for option in self._option_string_actions if option[:2] == "--"]))

    def _print_message(self, message: str, file: Any = None) -> None:
        """At once, so that whatever is wrong with stdout is found here."""
        super()._print_message(message, file)
        (file or sys.stderr).flush()

    def format_help(self) -> str:
        """As usual, without naming all options twice."""
        self.usage = self._usage()
        return super().format_help()

    def _short_usage(self) -> str:
        return f"usage: {self._usage()}    ({self.prog} --help says everything)"

    def _usage(self) -> str:
        words = [self.prog, "[OPTIONS]"]
        for action in self._actions:
            name = str(action.metavar or action.dest)
            if action.option_strings:
                words += [action.option_strings[-1], name] if action.required else []
            else:
                words.append(f"[{name}]" if action.nargs == "?" else name)
        return " ".join(words)


def nearest(word: str, names: Collection[str]) -> str | None:
    """The name that was probably meant, if one is much like the word or is the only one that begins with it."""
    by_letters = {_letters(name): name for name in names}
    wanted = _letters(word)
    beginning = [name for letters, name in by_letters.items() if letters.startswith(wanted)]
    if wanted in by_letters or len(beginning) == 1:
        return by_letters.get(wanted, beginning[0])
    close = difflib.get_close_matches(wanted, by_letters, n=1)
    return by_letters[close[0]] if close else None


def _letters(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()


def _question(name: str | None) -> str:
    return "" if name is None else f" (did you mean {name}?)"


def _any_of(names: Sequence[str]) -> str:
    return f"it is one of {', '.join(names)}"
