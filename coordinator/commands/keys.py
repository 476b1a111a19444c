"""`glmpipe keys`: who may join from other hosts, and by which key this host is known there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.commands.options import wrong_use
from coordinator.commands.session import say
from coordinator.signals import signals_deferred

if TYPE_CHECKING:
    from protocol.key_files import KeyDirectory

HELP = "make this host's key; say which other hosts may join"
EXAMPLES = """\
examples:
  glmpipe keys new                                # on every host, once: makes its key pair, prints the public key
on the host that launches:
  glmpipe keys allow lab2 'PUBLIC KEY OF LAB2'    # or let the worker join with the token that launch prints
  glmpipe keys list
taking it back, at any time, also while a launch runs (it takes effect at once):
  glmpipe keys revoke lab2                        # all its keys
replacing a worker's key without a gap:
  lab2:   glmpipe keys new --replace
  launch: glmpipe keys allow lab2 'NEW KEY'       # both count
          glmpipe keys revoke 'OLD KEY'           # the workers there join again with the new one, by themselves
replacing the launching host's own key: keys new --replace there, start the launch anew, and give the workers
  the new --key.

Hosts know each other by key pairs. A secret key never leaves its host; public keys are told to others.
The names given to other hosts here are those that a plan uses (host = "lab2").
Keys are in ~/.config/glmpipe/keys ($XDG_CONFIG_HOME), readable by their owner alone; otherwise they are refused.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's own subcommands."""
    parser.add_argument("--keys", metavar="DIR", type=Path, help="where keys are (default ~/.config/glmpipe/keys)")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make this host's key pair, print the public key")
    new.add_argument("--replace", action="store_true", help="although there is one; others must be told the new key")
    actions.add_parser("show", help="print this host's public key")
    actions.add_parser("list", help="print the hosts that may join, and their public keys")
    allow = actions.add_parser("allow", help="let a host join")
    allow.add_argument("name", metavar="NAME", help="what plans call that host")
    allow.add_argument("key", metavar="PUBLIC_KEY", help="what `glmpipe keys show` prints there")
    allow.add_argument(
        "--address",
        metavar="IP",
        action="append",
        default=[],
        help="where its workers listen, too (--listen): they may always where they come from",
    )
    revoke = actions.add_parser("revoke", help="let a host join no more")
    revoke.add_argument("name", metavar="NAME|PUBLIC_KEY", help="a host, or one of its keys")


def run(options: argparse.Namespace) -> int:
    """Do what the subcommand says."""
    from protocol.key_files import KeyDirectory

    with wrong_use(), signals_deferred():  # it takes no time, and leaves no half of a file
        _run(options, KeyDirectory(options.keys))
    return 0


def _run(options: argparse.Namespace, keys: KeyDirectory) -> None:
    match options.action:
        case "new":
            print(keys.make_own(replace=options.replace).public)
        case "show":
            print(keys.own().public)
        case "list":
            _list(keys)
        case "allow":
            keys.allowed.add(options.name, options.key, options.address)
            print(f"{options.name} may join")
        case "revoke":
            for key in keys.allowed.remove(options.name):
                print(f"revoked {key}")


def _list(keys: KeyDirectory) -> None:
    names = keys.allowed.names()
    width = max((len(name) for name in names.values()), default=0)
    for key, name in sorted(names.items(), key=lambda entry: entry[::-1]):
        print("  ".join([f"{name:<{width}}  {key}", *keys.allowed.addresses(name)]))
    if not names:
        say(
            f"no other host may join ({keys.allowed.path} has no key): `glmpipe keys allow NAME 'PUBLIC KEY'` lets one "
            "in, with the key that `glmpipe keys new` prints there"
        )
