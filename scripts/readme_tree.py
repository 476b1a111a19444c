"""Writes the README's tree, one line a file, from the first sentence of every module's docstring.

Run `python scripts/readme_tree.py` after adding, renaming or redescribing a file; a test compares.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PACKAGES = ("glm", "protocol", "stage_worker", "coordinator")
BEGIN, END = "<!-- tree: written by scripts/readme_tree.py -->\n", "<!-- end of tree -->\n"


def describe(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0].rstrip(".")


def tree() -> str:
    """All modules of the packages, a line each, directories as headings."""
    lines = []
    for package in PACKAGES:
        for directory in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            lines.append(f"{directory.relative_to(ROOT)}/")
            paths = sorted(path for path in directory.glob("*.py") if path.name != "__init__.py")
            width = max(len(path.name) for path in paths)
            lines += [f"    {path.name:<{width}}  {describe(path)}" for path in paths]
    return "```\n" + "\n".join(lines) + "\n```\n"


def with_tree(text: str) -> str:
    """A README's text with the tree between its marks replaced by today's."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + tree() + END + tail


if __name__ == "__main__":
    README.write_text(with_tree(README.read_text(encoding="utf-8")), encoding="utf-8")
