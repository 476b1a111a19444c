"""The arrows of the house, read from the source: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("glm", "protocol", "stage_worker", "coordinator")
FORBIDDEN = {
    "glm": {"protocol", "stage_worker", "coordinator"},
    "protocol": {"glm", "stage_worker", "coordinator", "torch", "transformers"},
    "stage_worker": {"coordinator", "transformers"},
    "coordinator": {"stage_worker", "transformers"},
}
KNOWS_TORCH = "torch_bridge.py"


def imported(source: ast.AST) -> set[str]:
    """Top-level packages imported anywhere in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide an arrow"
            found.add((node.module or "").partition(".")[0])
    return found


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package: str) -> None:
    """Libraries import neither each other nor a program; programs do not import each other; nobody needs
    transformers; in `protocol` only the torch bridge knows torch, and nothing else there imports the bridge."""
    for path in sources(package):
        names = imported(ast.parse(path.read_text(encoding="utf-8")))
        allowed = {"torch"} if path.name == KNOWS_TORCH else set()
        wrong = names & (FORBIDDEN[package] - allowed)
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_only_outsiders_use_the_torch_bridge() -> None:
    """Messages and frames work without torch installed."""
    for path in sources("protocol"):
        assert path.name == KNOWS_TORCH or "torch_bridge" not in path.read_text(encoding="utf-8"), path


BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "imp"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "recv_serialized"}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_from_outside_is_ever_executed(package: str) -> None:
    """No pickle, marshal, eval, exec or pyobj sockets; torch.load only with weights_only; no remote code."""
    for path in sources(package):
        where = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not imported(tree) & BANNED_MODULES, where
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in BANNED_ATTRIBUTES, where
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                assert node.func.id not in BANNED_CALLS, f"{where}:{node.lineno}"
            keywords = {k.arg: k.value for k in node.keywords}
            assert "trust_remote_code" not in keywords, f"{where}:{node.lineno}"
            if ast.unparse(node.func) == "torch.load":
                weights_only = keywords.get("weights_only")
                assert isinstance(weights_only, ast.Constant), f"{where}:{node.lineno}"
                assert weights_only.value is True, f"{where}:{node.lineno}"


def test_no_function_is_longer_than_sixty_lines() -> None:
    """A function that long has a part that deserves a name."""
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    assert length <= 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
