"""A user whom nobody knows: HOME is unset, and the list of users does not have him."""

import pwd

import pytest

CHANGE = "import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = lambda uid: {}[uid]"
"""The same as a statement for a process of its own."""


def forget_home(patch: pytest.MonkeyPatch) -> None:
    """For the rest of a test."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    patch.delenv("HOME", raising=False)
    patch.setattr(pwd, "getpwuid", nobody)
