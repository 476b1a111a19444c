"""Where keys lie: this host's own key pair, and the public keys of those it lets in.

    ~/.config/glmpipe/keys/      0700
        own.key                  0600: this host's key pair
        allowed/                 0700
            lab2.pub             0600: public keys, one a line, of the host that is called lab2 here; `address IP`, too,
                             where its workers listen at an address that they do not come from

Files are made whole under another name and then moved: nobody ever reads half of one.
"""

import contextlib
import ipaddress
import os
import re
import stat
import tempfile
import threading
import tomllib
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import KeyFileError, SecurityError
from protocol.security import KeyPair, checked_key, new_key_pair

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SUFFIX = ".pub"
_ADDRESS = "address "
MAX_FILE_BYTES = 64 * 1024


def default_directory() -> Path:
    """`$XDG_CONFIG_HOME/glmpipe/keys`, mostly `~/.config/glmpipe/keys`. Raises SecurityError: nobody knows `~`."""
    base = os.environ.get("XDG_CONFIG_HOME")
    config = Path(base) if base and Path(base).is_absolute() else _expanded(Path("~/.config"))
    return config / "glmpipe" / "keys"


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise SecurityError(
            f"{path} is nowhere: no such home directory is known (HOME is {os.environ.get('HOME', 'unset')}); give the "
            "directory of the keys by its whole path, with --keys"
        ) from None


def checked_host_name(text: str) -> str:
    """`text` if a host may be called so in the allow-list and in a plan. Raises SecurityError."""
    if not _NAME.fullmatch(text):
        raise SecurityError(f"{text!r:.80} does not suit as a host's name: use letters, digits and . _ - (at most 63)")
    return text


def checked_address(text: str) -> str:
    """`text` if it is an IP address. Raises SecurityError."""
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        raise SecurityError(f"{text!r:.80} is no IP address of a host") from None


class KeyDirectory:
    """This host's keys. Whatever is read is checked first: only its owner may have access."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = (default_directory() if path is None else _expanded(path)).absolute()

    @property
    def own_path(self) -> Path:
        """The file with this host's own key pair."""
        return self.path / "own.key"

    def own(self) -> KeyPair:
        """This host's key pair.

        Raises:
            SecurityError: there is none, it is malformed, or others may read it.
        """
        if not _is_there(self.own_path):
            raise SecurityError(f"this host has no key ({self.own_path}): make one with `glmpipe keys new`")
        _check_private(self.path, 0o700)
        text = read_private(self.own_path)
        try:
            table = tomllib.loads(text)
            return KeyPair(str(table["public"]), str(table["secret"]))
        except (tomllib.TOMLDecodeError, KeyError):
            raise SecurityError(
                f"{self.own_path} is no key file: make a new one with `glmpipe keys new --replace`"
            ) from None

    def make_own(self, *, replace: bool = False) -> KeyPair:
        """Make and keep a key pair for this host. Raises SecurityError if there is one that is not to be replaced."""
        if _is_there(self.own_path) and not replace:
            raise SecurityError(
                f"this host has a key already ({self.own_path}); `glmpipe keys new --replace` makes another, which all "
                "hosts that know the old one must then be told"
            )
        keys = new_key_pair()
        text = f'# Secret: whoever reads this file can pass for this host.\npublic = "{keys.public}"\n'
        _write_private(self.own_path, text + f'secret = "{keys.secret}"\n')
        return keys

    @property
    def allowed(self) -> "AllowList":
        """The public keys of other hosts."""
        return AllowList(self.path / "allowed")


class AllowList:
    """Names of hosts and their public keys, read anew whenever the files have changed.

    A host may have several keys, as it has while one is replaced by another. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: object = None
        self._names: dict[str, str] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}

    def names(self) -> dict[str, str]:
        """The name that each allowed public key stands for.

        Raises:
            SecurityError: others may change the files, or one is malformed.
        """
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._names, self._addresses = self._read()
                self._seen = state
            return dict(self._names)

    def addresses(self, name: str) -> tuple[str, ...]:
        """Where a host's workers may listen besides the address that they come from; as it was last read."""
        with contextlib.suppress(SecurityError):
            self.names()
        with self._lock:
            return self._addresses.get(name, ())

    def name_of(self, key: str) -> str | None:
        """Whose key this is; None for a stranger's, and for everybody's while the list cannot be read."""
        try:
            return self.names().get(key)
        except SecurityError:
            return None

    def add(self, name: str, key: str, addresses: Sequence[str] = ()) -> None:
        """Let a host in. Its other keys and addresses go on counting.

        Raises SecurityError if the key is another host's, or an address is none.
        """
        known = self.names().get(checked_key(key))
        if known not in (None, checked_host_name(name)):
            raise SecurityError(f"this key is {known}'s already: `glmpipe keys revoke {known}` first")
        there = self.addresses(name)
        wanted = tuple(dict.fromkeys((*there, *map(checked_address, addresses))))
        if known is None or wanted != there:
            keys = dict.fromkeys((*(k for k, other in self.names().items() if other == name), key))
            self._write(name, list(keys), wanted)

    def remove(self, name_or_key: str) -> list[str]:
        """Let a host in no more, or one of its keys; returns the keys that went. Raises SecurityError if none did."""
        names = self.names()
        gone = [key for key, name in names.items() if name_or_key in (key, name)]
        if not gone:
            known = ", ".join(sorted(set(names.values()))) or "none at all"
            raise SecurityError(f"no host and no key {name_or_key!r:.80} is allowed here; allowed are: {known}")
        name = names[gone[0]]
        left = [key for key, other in names.items() if other == name and key not in gone]
        self._write(name, left, self.addresses(name))
        return gone

    def _write(self, name: str, keys: Sequence[str], addresses: Sequence[str]) -> None:
        path = self.path / f"{name}{_SUFFIX}"
        if keys:
            lines = [*keys, *(f"{_ADDRESS}{address}" for address in addresses)]
            _write_private(path, "".join(f"{line}\n" for line in lines))
        else:
            try:
                path.unlink()
            except OSError as error:
                raise KeyFileError(f"{path} cannot be removed: {error.strerror}") from None

    def _files(self) -> list[Path]:
        try:
            return sorted(path for path in self.path.iterdir() if path.name.endswith(_SUFFIX))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise KeyFileError(f"{self.path}: {error.strerror}") from None

    def _state(self) -> object:
        """Something that differs whenever the files do."""
        states = []
        for path in self._files():
            try:
                info = path.lstat()
            except FileNotFoundError:
                continue
            states.append((path.name, info.st_ino, info.st_mtime_ns, info.st_size, info.st_mode))
        return states

    def _read(self) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
        names: dict[str, str] = {}
        addresses: dict[str, tuple[str, ...]] = {}
        files = self._files()
        if files:
            _check_private(self.path, 0o700)
        for path in files:
            name = checked_host_name(path.name.removesuffix(_SUFFIX))
            for line in map(str.strip, read_private(path).splitlines()):
                if line.startswith(_ADDRESS):
                    addresses[name] = (*addresses.get(name, ()), checked_address(line.removeprefix(_ADDRESS)))
                elif line and not line.startswith("# "):
                    names.setdefault(checked_key(line), name)
        return names, addresses


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    return True


def _check_private(path: Path, mode: int) -> None:
    """Raises SecurityError unless `path` is this user's own and nobody else has any access to it."""
    try:
        info = path.lstat()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    if stat.S_ISLNK(info.st_mode):
        raise SecurityError(f"{path} is a symbolic link: put the file itself there")
    if info.st_uid != os.geteuid():
        raise SecurityError(f"{path} belongs to another user: keys are only taken from one's own files")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise SecurityError(
            f"others have access to {path} (mode {stat.S_IMODE(info.st_mode):04o}): chmod {mode:o} {path}; if "
            "somebody may have read a secret key there, replace it (`glmpipe keys new --replace`)"
        )


def read_private(path: Path) -> str:
    """A file's text, if it is this user's own and nobody else has access. Raises SecurityError."""
    _check_private(path, 0o600)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SecurityError(f"{path} is not UTF-8 text") from None
    if len(text) > MAX_FILE_BYTES:
        raise SecurityError(f"{path} has more than {MAX_FILE_BYTES} bytes: that is no file of keys")
    return text


def _write_private(path: Path, text: str) -> None:
    """The whole file or nothing, readable by its owner alone from its first moment on."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(path.parent, 0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # made with mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None
