"""A folder into which pictures come while somebody waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from cairn.data.picture_files import pictures_in_tree
from cairn.errors import DataError, one_line

SECONDS = 1.0
"""Between two looks."""


def new_pictures(folder: Path, known: Iterable[Path] = (), seconds: float = SECONDS) -> Iterator[list[Path]]:
    """Pictures in a folder and those in it, once each: first those that are there, then whatever comes, for ever.

    A picture is handed out when two looks, `seconds` apart, find it with the same size and time: one that is being written
    is waited for. Raises DataError if there is no such folder, or it is gone.
    """
    done, sizes = {path.resolve() for path in known}, {}
    while True:
        if not folder.is_dir():
            raise DataError(f"'{one_line(folder)}': no such folder to watch; make it, or name another")
        ready: list[Path] = []
        for path in pictures_in_tree(folder)[0]:
            whole = path.resolve()
            if whole in done:
                continue
            with suppress(OSError):  # gone again
                found = path.stat()
                state = found.st_size, found.st_mtime_ns
                if sizes.get(whole) == state:
                    done.add(whole)
                    sizes.pop(whole)
                    ready.append(path)
                else:
                    sizes[whole] = state
        if ready:
            yield ready
        time.sleep(seconds)
