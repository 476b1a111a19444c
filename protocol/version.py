"""The version of the package and of the protocol it speaks."""

VERSION = "0.1.0"
"""The package's version, as `glmpipe --version` prints it."""

PROTOCOL_VERSION = 8
"""Goes into every header; two programs that differ in it do not talk to each other."""
