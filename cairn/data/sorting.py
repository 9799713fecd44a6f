"""Pictures sorted into a folder per class, as links or copies."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Literal

from cairn.errors import counted, one_line
from cairn.storage.files import ELSEWHERE, atomic_write, make_folder, unwritable

UNKNOWN = "unknown"


class SortedFolder:
    """A folder with a folder per class, called after it, and one for pictures of no known class.

    Signs that no folder may have in its name, and `%`, are written as `%2F` and the like, so that two classes never share
    one. A picture that lies there already, the same link or a copy of the same bytes, is left; another one of that name
    stays, and the new one gets a number.
    """

    def __init__(self, folder: Path, how: Literal["link", "copy"] = "link"):
        self.folder, self.how, self._counts = folder, how, Counter[str]()

    def put(self, file: Path, name: str | None) -> Path:
        """The picture among those of class `name`; of None among the unknown ones. Raises ResultError if it cannot be written."""
        place = self.folder / (UNKNOWN if name is None else folder_name(name))
        make_folder(place)
        number, target = 1, place / file.name
        while os.path.lexists(target) and not self._is(target, file):
            number += 1
            target = place / f"{file.stem}-{number}{file.suffix}"
        try:
            if not os.path.lexists(target):
                if self.how == "link":
                    target.symlink_to(file.resolve())
                else:
                    with atomic_write(target) as temporary:
                        shutil.copy2(file, temporary)
        except OSError as error:
            raise unwritable(target, error, "use --copy" if self.how == "link" else ELSEWHERE) from None
        self._counts[place.name] += 1
        return target

    def _is(self, target: Path, file: Path) -> bool:
        if target.is_symlink():
            return self.how == "link" and target.resolve() == file.resolve()
        same_size = target.is_file() and target.stat().st_size == file.stat().st_size
        return self.how == "copy" and same_size and target.read_bytes() == file.read_bytes()

    def summary(self) -> str:
        """'2 folders: cat 3, unknown 1'."""
        each = ", ".join(f"{one_line(name)} {number:,}" for name, number in sorted(self._counts.items()))
        return f"{counted(len(self._counts), 'folder')}: {each}" if each else "nothing"


def folder_name(name: str) -> str:
    """A name that a folder can have on any system, another one for every class."""
    safe = re.sub(r'[%/\\:*?"<>|\x00-\x1f]|^\.|[. ]$', lambda sign: f"%{ord(sign[0]):02X}", name)
    return f"{safe}%" if safe == UNKNOWN else safe
