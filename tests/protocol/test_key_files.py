"""Key files: private, whole, and read anew when they change."""

import os
from pathlib import Path

import pytest

from protocol.errors import SecurityError
from protocol.key_files import AllowList, KeyDirectory, default_directory
from protocol.security import new_key_pair


@pytest.fixture
def keys(tmp_path: Path) -> KeyDirectory:
    return KeyDirectory(tmp_path / "keys")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_key_pair_is_kept_for_its_owner_alone(keys: KeyDirectory) -> None:
    """Directory 0700, file 0600, no other file left; what is read is what was made; the secret is not the public."""
    old_mask = os.umask(0)
    try:
        made = keys.make_own()
    finally:
        os.umask(old_mask)
    assert keys.own() == made
    assert mode(keys.path) == 0o700 and mode(keys.own_path) == 0o600
    assert [path.name for path in keys.path.iterdir()] == ["own.key"]


def test_a_key_is_replaced_only_when_asked(keys: KeyDirectory) -> None:
    """No key is lost by accident, and without one the remedy is told."""
    with pytest.raises(SecurityError, match=r"no key.*glmpipe keys new"):
        keys.own()
    first = keys.make_own()
    with pytest.raises(SecurityError, match="--replace"):
        keys.make_own()
    assert keys.own() == first
    assert keys.make_own(replace=True) != first


@pytest.mark.parametrize("bad_mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_is_refused(keys: KeyDirectory, bad_mode: int) -> None:
    """Whoever could read or change a key file is reason enough; the remedy is a command."""
    keys.make_own()
    keys.own_path.chmod(bad_mode)
    with pytest.raises(SecurityError, match=f"mode {bad_mode:04o}.*chmod 600 {keys.own_path}"):
        keys.own()
    keys.own_path.chmod(0o600)
    keys.path.chmod(0o755)
    with pytest.raises(SecurityError, match=f"chmod 700 {keys.path}"):
        keys.own()


def test_links_and_garbage_are_refused(keys: KeyDirectory, tmp_path: Path) -> None:
    """A symbolic link, text that is no key file, and a huge file each say what they are."""
    keys.make_own()
    keys.own_path.rename(tmp_path / "elsewhere")
    keys.own_path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecurityError, match="symbolic link"):
        keys.own()
    keys.own_path.unlink()
    for text, words in (("public = ", "no key file"), ("x = 1", "no key file"), ("#" * 70_000, "more than 65536")):
        keys.own_path.write_text(text)
        keys.own_path.chmod(0o600)
        with pytest.raises(SecurityError, match=words):
            keys.own()


def test_allowed_hosts_come_and_go_without_a_restart(keys: KeyDirectory) -> None:
    """What one process writes, another list that has been read before sees the next time it is asked."""
    writer, reader = keys.allowed, keys.allowed
    old, new, other = (new_key_pair().public for _ in range(3))
    assert reader.names() == {} and reader.name_of(old) is None
    writer.add("lab2", old)
    assert reader.name_of(old) == "lab2"
    writer.add("lab2", new)
    writer.add("lab3", other)
    assert reader.names() == {old: "lab2", new: "lab2", other: "lab3"}
    assert writer.remove(old) == [old]
    assert reader.names() == {new: "lab2", other: "lab3"}
    assert writer.remove("lab2") == [new]
    assert reader.names() == {other: "lab3"}
    assert mode(keys.path / "allowed") == 0o700 and mode(keys.path / "allowed" / "lab3.pub") == 0o600


def test_the_allow_list_says_what_is_wrong(keys: KeyDirectory) -> None:
    """A key of two hosts, unknown names, names that are paths, and malformed keys."""
    allowed, key = keys.allowed, new_key_pair().public
    allowed.add("lab2", key)
    with pytest.raises(SecurityError, match="lab2's already"):
        allowed.add("lab3", key)
    with pytest.raises(SecurityError, match="allowed are: lab2"):
        allowed.remove("lab9")
    for name in ("../lab2", "", ".hidden", "a b", "x" * 64):
        with pytest.raises(SecurityError, match="host's name"):
            allowed.add(name, new_key_pair().public)
    with pytest.raises(SecurityError, match="no public key"):
        allowed.add("lab3", "short")


def test_a_list_that_others_may_change_lets_nobody_in(keys: KeyDirectory) -> None:
    """Until it is private again; then everybody on it is back."""
    key = new_key_pair().public
    allowed: AllowList = keys.allowed
    allowed.add("lab2", key)
    path = keys.path / "allowed" / "lab2.pub"
    path.chmod(0o666)
    assert allowed.name_of(key) is None
    with pytest.raises(SecurityError, match="chmod 600"):
        allowed.names()
    path.chmod(0o600)
    assert allowed.name_of(key) == "lab2"


def test_where_keys_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CONFIG_HOME if it is absolute, as its specification says, else ~/.config."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "glmpipe" / "keys"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".config" / "glmpipe" / "keys"
