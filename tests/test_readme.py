"""The README's placement examples are plans that this version accepts, and each is told twice the same way."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from coordinator.cli import make_parser
from coordinator.commands.options import plan_request
from coordinator.plan_file import plan_request_of
from coordinator.planning import plan_for

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEVICES = ("cpu", "cuda:0", "cuda:1")
NUM_LAYERS = {"THUDM/chatglm-6b": 28, "THUDM/chatglm2-6b": 28, "THUDM/glm-4-9b-chat": 40}
EXAMPLES = re.findall(r"^    (glmpipe chat --model [^\n]*)\n\n```toml\n(.*?)```", README, re.M | re.S)


def test_every_setting_has_its_example() -> None:
    """8 + 8 GB, 8 + 8 GB + CPU, 6 GB + CPU and 4 GB + CPU are there, each with a plan file."""
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize(("command", "plan_file"), EXAMPLES)
def test_options_and_plan_file_mean_the_same_stages(command: str, plan_file: str) -> None:
    """The command's options and the plan file below them resolve to the same stages, without a fault."""
    options = make_parser().parse_args(shlex.split(command)[1:])
    from_file = plan_request_of(tomllib.loads(plan_file))
    assert from_file.model == options.model
    num_layers = NUM_LAYERS[options.model]
    by_options, by_file = (plan_for(wish, num_layers, DEVICES) for wish in (plan_request(options), from_file))
    assert by_options.stages == by_file.stages
    assert by_options.ends == by_file.ends


def test_the_tree_is_todays() -> None:
    """One line for every file, as `python scripts/readme_tree.py` writes it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from readme_tree import with_tree
    finally:
        sys.path.pop(0)
    assert with_tree(README) == README, "run `python scripts/readme_tree.py`"
