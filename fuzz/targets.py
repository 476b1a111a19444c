"""All targets by name; each is imported when it is asked for."""

from importlib import import_module

from fuzz.target import Target

TARGETS = {
    "frames": "fuzz.frames",
    "weights": "fuzz.files",
    "quantized": "fuzz.quantized",
    "tokenizer": "fuzz.files",
    "plan": "fuzz.files",
    "prompts": "fuzz.files",
}


def load_target(name: str) -> Target:
    """The target, from the module that has it under its name."""
    target = getattr(import_module(TARGETS[name]), name.upper())
    assert isinstance(target, Target)
    return target
