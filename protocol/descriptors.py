"""File descriptors: as many as a process may have, and which errors say that it has none left just now."""

import errno
import resource

MOST_DESCRIPTORS = 65_536
"""More is of no use here, and other libraries walk through all that there could be."""
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})
"""Errors of this process, or this host, that pass: nobody else did anything wrong."""


def descriptor_limit() -> int:
    """How many this process may have open now."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> int:
    """Take as many as the system grants, which is mostly far more than the 1024 that it starts with; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor_limit()
