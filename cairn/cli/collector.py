"""Python's garbage collector, left out where it has nothing to find.

While half a million objects of modules are made it goes through them again and again, and once more when the process ends: a
third of what `cairn predict` takes of the processor.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For imports, and for loading what stays: nothing is collected inside, and what is there at the end is never looked at
    again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def end_without_collection() -> None:
    """At the end of the process the memory is given back as it is. Files are closed and `atexit` is called as ever."""
    atexit.register(gc.freeze)
