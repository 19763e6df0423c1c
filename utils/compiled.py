"""Functions that Numba compiles."""

import functools
from collections.abc import Callable

from numba import njit


def compiled(function: Callable) -> Callable:
    """`function`, compiled without Python's lock. The code is kept on disk for the next process
    where a folder takes it (beside the source, else in the user's cache or NUMBA_CACHE_DIR); in a
    read-only container, or on a full disk, each process compiles it anew, which takes seconds.
    """
    plain = njit(nogil=True)(function)
    try:
        cached = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder can be written
        return plain
    chosen = cached

    @functools.wraps(function)
    def call(*arguments):
        nonlocal chosen
        try:
            return chosen(*arguments)
        except OSError:  # of the cache: compiled code opens no files
            chosen = plain
            return plain(*arguments)

    return call
