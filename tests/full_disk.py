"""A disk that takes no more, as far as a test can have one."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond a size until the end of the block.

    A write that would cross it stops there, and the next one fails, as on a full disk. Tests ask
    for ``capsys`` too: what pytest keeps of the output is a file as well, if nobody asks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
