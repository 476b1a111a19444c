"""Everything that can be wrong with what another process said.

ProtocolError
├── FrameError      not our frames at all: their number, a size, no msgpack, no header
├── VersionError    a header of another protocol version
├── MessageError    an unknown type, a missing, unknown, mistyped or impossible field
├── TensorError     a descriptor beyond the limits, or a buffer that does not match it
├── EndpointError   an address that is malformed, or that nobody may bind or connect so
├── DescriptorError this process has no file descriptor left for a socket, which passes
└── SecurityError   a key that is malformed, missing, or in a file that others may read
    └── KeyFileError    a file of keys that cannot be read or written
"""


class ProtocolError(Exception):
    """Whatever arrived, or was about to be sent, breaks the contract of protocol/README.md."""


class FrameError(ProtocolError):
    """The frames cannot be read as a header and its tensors."""


class VersionError(ProtocolError):
    """The peer speaks another version of the protocol."""


class MessageError(ProtocolError):
    """A header that reads well but holds no valid message; `path` says in which message."""

    def __init__(self, text: str, path: str = "") -> None:
        super().__init__(f"{path}: {text}" if path else text)
        self.text = text
        self.path = path


class TensorError(ProtocolError):
    """A tensor's descriptor and its buffer disagree, or go beyond the limits."""


class EndpointError(ProtocolError):
    """An address that is malformed or not allowed."""


class DescriptorError(ProtocolError):
    """This process, or this host, has no file descriptor left for a socket just now."""


class SecurityError(ProtocolError):
    """A key that is malformed, missing, or kept where others may read it; says what to do."""


class KeyFileError(SecurityError):
    """A file of keys cannot be read or written: permissions, a full disk."""
