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


BANNED_MODULES = {
    *(
        "pickle",
        "_pickle",
        "cPickle",
        "pickletools",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
        "joblib",
        "jsonpickle",
    ),
    *("imp", "builtins", "runpy", "code", "codeop", "pty"),
}
BANNED_NAMES = {"eval", "exec", "compile", "__import__"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized", "read_pickle", "to_pickle"}
BANNED_FUNCTIONS = {
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
}
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True)}
NEVER_WITH = {"allow_pickle": (False,), "trust_remote_code": (False,), "shell": (False,)}
"""Keywords, whatever takes them, and the values they may have."""
READ_FOR_BANS = (*PACKAGES, "benchmarks", "fuzz", "scripts")


def banned(tree: ast.AST) -> list[str]:
    """What a source does that could run what came from outside, with the line; by whichever name it calls it."""
    found = [f"imports {name}" for name in sorted(imported(tree) & BANNED_MODULES)]
    names = _names_given(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            full = _full_name(node, names)
            if full in BANNED_NAMES | BANNED_FUNCTIONS or full.rpartition(".")[2] in BANNED_ATTRIBUTES:
                found.append(f"line {node.lineno}: {full}")
        elif isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {fault}" for fault in _banned_call(node, names)]
    return found


def _names_given(tree: ast.AST) -> dict[str, str]:
    """What imports call things here, and what these are called everywhere."""
    given = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            given |= {alias.asname or alias.name: within + alias.name for alias in node.names if alias.name != "*"}
    return given


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return names.get(first, first) + dot + rest


def _banned_call(call: ast.Call, names: dict[str, str]) -> list[str]:
    name = _full_name(call.func, names)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    faults = []
    keyword, safe = SAFE_ONLY_WITH.get(name, ("", None))
    if keyword and not _is(given.get(keyword), (safe,)):
        faults.append(f"{name} without {keyword}={safe}")
    wrong = [key for key, allowed in NEVER_WITH.items() if key in given and not _is(given[key], allowed)]
    return [*faults, *(f"{key} of {name}" for key in wrong)]


def _is(value: ast.expr | None, allowed: tuple[object, ...]) -> bool:
    return isinstance(value, ast.Constant) and value.value in allowed


@pytest.mark.parametrize("directory", READ_FOR_BANS)
def test_nothing_from_outside_is_ever_executed(directory: str) -> None:
    """No pickle, marshal, eval, exec or pyobj sockets; torch.load only with weights_only; no remote code, no shell."""
    for path in sources(directory):
        assert not banned(ast.parse(path.read_text(encoding="utf-8"))), path.relative_to(ROOT)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "def f():\n    import dill",
        "import shelve",
        "eval('1')",
        "exec(text)",
        "socket.recv_pyobj()",
        "read = socket.send_pyobj",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "import cloudpickle as fast",
        "import os\nos.system(text)",
        "from os import system as run\nrun(text)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "import yaml as y\ny.load(text, y.Loader)",
        "found = map(eval, texts)",
        "from subprocess import getoutput\ngetoutput(text)",
        "handlers = {'x': os.popen}",
        "from numpy import load\nload(path, allow_pickle=True)",
    ],
)
def test_what_could_execute_something_is_found(source: str) -> None:
    """The lint itself sees each of the banned ways."""
    assert banned(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "torch.load(path, weights_only=True)", "re.compile(text)", "import yaml\nyaml.safe_load(text)"],
)
def test_what_only_looks_alike_is_allowed(source: str) -> None:
    """The lint is no nuisance."""
    assert not banned(ast.parse(source))


def test_no_function_is_longer_than_sixty_lines() -> None:
    """A function that long has a part that deserves a name."""
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    assert length <= 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
