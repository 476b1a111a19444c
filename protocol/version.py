"""The version of the package and of the protocol it speaks."""

VERSION = "0.1.0"
"""The package's version, as `glmpipe --version` prints it."""


PROTOCOL_VERSION = 14
"""Goes into every header; two programs that differ in it do not talk to each other."""


def suits(version: str) -> bool:
    """Whether a process of this version of the package may work with one of ours: the last number may differ.

    It counts mends that change neither a message nor a number that a stage computes.
    """
    return version.split(".")[:2] == VERSION.split(".")[:2]
