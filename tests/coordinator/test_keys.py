"""`glmpipe keys`: from no key to a host that may join, and back."""

from pathlib import Path

import pytest

from coordinator.cli import main


def keys(directory: Path, *words: str) -> int:
    return main(["keys", "--keys", str(directory), *words])


def test_two_hosts_get_to_know_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys are made and shown on one host, allowed, listed and revoked on the other."""
    worker, launching = tmp_path / "worker", tmp_path / "launching"
    assert keys(worker, "new") == 0
    public = capsys.readouterr().out.strip()
    assert keys(worker, "show") == 0
    assert capsys.readouterr().out.strip() == public
    assert keys(launching, "allow", "lab2", public) == 0
    assert keys(launching, "list") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"lab2  {public}"
    assert keys(launching, "allow", "lab2", public, "--address", "10.0.0.2", "--address", "fd00::2") == 0
    capsys.readouterr()
    assert keys(launching, "list") == 0
    assert capsys.readouterr().out == f"lab2  {public}  10.0.0.2  fd00::2\n"
    assert keys(launching, "revoke", "lab2") == 0
    assert capsys.readouterr().out == f"revoked {public}\n"
    assert keys(launching, "list") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("no other host may join (") and "`glmpipe keys allow NAME 'PUBLIC KEY'`" in err


def test_faults_are_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No key yet, one too many, a malformed one, an unknown host: wrong use, so that nothing was done."""
    for words, told in (
        (("show",), "glmpipe keys new"),
        (("allow", "lab2", "short"), "no public key"),
        (("allow", "lab2", "a" * 40, "--address", "lab2.example"), "is no IP address"),
        (("revoke", "lab2"), "allowed are: none at all"),
    ):
        assert keys(tmp_path, *words) == 2
        assert told in capsys.readouterr().err
    assert keys(tmp_path, "new") == 0
    assert keys(tmp_path, "new") == 2
    assert "--replace" in capsys.readouterr().err
    assert keys(tmp_path, "new", "--replace") == 0


def test_a_key_that_cannot_be_written_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was wrong with the words: the exit code is that of failures."""
    (tmp_path / "file").touch()
    assert keys(tmp_path / "file", "new") == 1
    assert "cannot be written: " in capsys.readouterr().err
