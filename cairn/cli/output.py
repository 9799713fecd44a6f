"""Standard output, of which it is said in one line if it cannot be written: a full disk behind `>`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from cairn.storage.files import unwritable


class Printed:
    """A text stream whose failed writes are a ResultError; where nobody reads on, as after `| head`, they stay what they are."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            if isinstance(error, BrokenPipeError):
                raise
            raise unwritable(Path("standard output"), error, "send it elsewhere") from None


@contextmanager
def standard_output() -> Iterator[None]:
    """What is printed inside is written when this ends, or raises as `Printed` does."""
    plain = sys.stdout
    if plain is None:  # closed by whoever started the process
        yield
        return
    printed = Printed(plain)
    sys.stdout = cast(TextIO, printed)
    try:
        yield
        printed.flush()
    finally:
        sys.stdout = plain
        if printed.failed:  # what is left in the buffer would be tried again, and complained of, when the process ends
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), plain.fileno())
