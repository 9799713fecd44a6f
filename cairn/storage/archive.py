"""Tensors and a record on disk in generations: a new one is written beside the last and checked, and only then is the one
before the last removed. Whatever happens meanwhile, one generation is whole.

    NAME-000007.json                     the manifest: record, and file, size and SHA-256 of every part
    NAME-state-1f2e....safetensors       a part, called after what it holds: one that did not change is not written again
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from torch import Tensor

from cairn.errors import ResultError
from cairn.storage.files import make_folder, read_json, sha256_of, write_chunks, write_json
from cairn.storage.schema import Count, Record, validated
from cairn.storage.tensors import read_tensors, require_finite, serialized

SCHEMA_VERSION = 1

PART = r"^[A-Za-z0-9][A-Za-z0-9=_-]{0,99}$"
"""What a part may be called: never a path."""

State = Mapping[str, Tensor]


class PartEntry(Record):
    """A file of tensors."""

    file: str
    bytes: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Record):
    """A generation, without its own SHA-256."""

    schema_version: int
    parts: dict[Annotated[str, Field(pattern=PART)], PartEntry]
    record: dict[str, Any] = Field(description="whose schema is that of the reader")


class Generation(NamedTuple):
    """What an archive holds. `damaged` tells of newer generations that could not be read."""

    record: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    damaged: list[str]


class Archive:
    """The generations called `name` in a folder. Two processes must not write the same one: see `cairn.experiment.folder.Lock`."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._pattern = re.compile(rf"{re.escape(name)}-([0-9]{{6}}|[1-9][0-9]{{6,}})\.json")
        self._written: dict[str, tuple[State, dict[str, Any]]] = {}

    def __bool__(self) -> bool:
        """Whether there is a generation, sound or not."""
        return bool(self._numbers())

    def write(self, record: Mapping[str, Any], parts: Mapping[str, State], keep: int = 2) -> None:
        """A new generation, after which the `keep` newest are kept. A part that is the very object written before is taken as
        unchanged.

        Raises ResultError where it cannot be written or does not read back; the generations before are then untouched.
        """
        make_folder(self.folder)
        entries, numbers = {}, self._numbers()
        try:
            for name, state in parts.items():
                before = self._written.get(name)
                if before is not None and before[0] is state and (self.folder / before[1]["file"]).is_file():
                    entries[name] = before[1]
                else:
                    entries[name] = self._part(name, state)
            self._write_manifest(numbers[-1] + 1 if numbers else 1, record, entries)
        except BaseException:
            self._sweep()
            raise
        self._written = {name: (parts[name], entry) for name, entry in entries.items()}
        self._sweep(keep)

    def read(self) -> Generation | None:
        """The newest sound generation, None if there is none at all. Raises ResultError if all there are is damaged, or the
        newest was written by a later version."""
        damaged: list[str] = []
        for number in reversed(self._numbers()):
            try:
                record, entries = self._checked(self._manifest(number))
                parts = {
                    name: read_tensors(self.folder / entry["file"], entry["sha256"], entry["bytes"])
                    for name, entry in entries.items()
                }
            except Newer:
                raise
            except ResultError as error:
                damaged.append(str(error))
                continue
            return Generation(record, parts, damaged)
        if damaged:
            raise ResultError(f"{damaged[0]}; no undamaged copy is left in '{self.folder}'")
        return None

    def back(self, amended: Callable[[dict[str, Any], dict[str, Any]], Mapping[str, Any] | None]) -> bool:
        """Put an earlier generation in the place of the newest: the nearest for which `amended(record of the newest, its record)`
        gives a record, which is then its own. Those between are removed; False if there is none.

        The newest manifest is replaced by one renaming, so that whatever happens meanwhile either is whole. Raises ResultError
        where the newest manifest, or one that would be passed, is damaged.
        """
        *earlier, newest = self._numbers() or [0]
        last = self._checked(self._manifest(newest))[0] if newest else {}
        for number in reversed(earlier):
            record, entries = self._checked(self._manifest(number))
            if (record := amended(last, record)) is None:
                continue
            for entry in entries.values():
                read_tensors(self.folder / entry["file"], entry["sha256"], entry["bytes"])
            self._write_manifest(newest, record, entries)
            for passed in earlier[earlier.index(number) :]:
                with suppress(OSError):
                    self._manifest(passed).unlink()
            self._written = {}
            self._sweep()
            return True
        return False

    def bytes_of_each(self) -> dict[int, int]:
        """By the number of each generation that is kept, the newest last, the bytes of its files; 0 where they cannot be told."""
        found = {}
        for number in self._numbers():
            with suppress(ResultError):
                found[number] = sum(entry["bytes"] for entry in self._checked(self._manifest(number))[1].values())
            found.setdefault(number, 0)
        return found

    def clear(self) -> None:
        """Remove every generation, and the folder if nothing else is in it."""
        self._written = {}
        self._sweep(keep=0)
        with suppress(OSError):
            self.folder.rmdir()

    def _write_manifest(self, number: int, record: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
        manifest = {"schema_version": SCHEMA_VERSION, "parts": dict(entries), "record": dict(record)}
        manifest["sha256"] = digest(manifest)
        path = self._manifest(number)
        write_json(path, manifest)
        try:
            self._checked(path)
        except ResultError:
            path.unlink(missing_ok=True)
            raise ResultError(f"'{path}': does not read back as it was written; check the disk") from None

    def _part(self, name: str, state: State) -> dict[str, Any]:
        if not re.fullmatch(PART, name):
            raise ValueError(f"part '{name}'")
        require_finite(self.folder / name, state)
        running = hashlib.sha256()
        for chunk in serialized(state):
            running.update(chunk)
        sha256 = running.hexdigest()
        path = self.folder / self._file(name, sha256)
        write_chunks(path, serialized(state))
        if sha256_of(path) != sha256:
            raise ResultError(f"'{path}': does not read back as it was written; check the disk")
        return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256}

    def _file(self, part: str, sha256: str) -> str:
        return f"{self.name}-{part}-{sha256[:16]}.safetensors"

    def _manifest(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06d}.json"

    def _numbers(self) -> list[int]:
        with suppress(OSError):
            found = (self._pattern.fullmatch(path.name) for path in self.folder.iterdir())
            return sorted(int(match[1]) for match in found if match)
        return []

    def _checked(self, path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Record and parts of a manifest that is what it must be."""
        stored = read_json(path)
        version = stored.get("schema_version") if isinstance(stored, dict) else None
        if type(version) is not int or version < 1:
            raise ResultError(f"'{path}': schema_version {str(version)[:20]}: not a manifest")
        if version > SCHEMA_VERSION:
            raise Newer(
                f"'{path}': schema_version {version}, this cairn reads up to {SCHEMA_VERSION}; use the version that wrote it"
            )
        if stored.pop("sha256", None) != digest(stored):
            raise ResultError(f"'{path}': damaged: it does not match its own SHA-256")
        manifest = validated(Manifest, stored, f"'{path}'")
        for name, entry in manifest.parts.items():
            if entry.file != self._file(name, entry.sha256):
                raise ResultError(f"'{path}': part '{name}' points to '{entry.file[:80]}', not to a file of its own")
        return manifest.record, {name: entry.model_dump() for name, entry in manifest.parts.items()}

    def _sweep(self, keep: int | None = None) -> None:
        """Remove all but the `keep` newest manifests (None: none of them), and parts that no manifest names."""
        numbers = self._numbers()
        if keep is not None:
            for number in numbers[: max(0, len(numbers) - keep)]:
                with suppress(OSError):
                    self._manifest(number).unlink()
            numbers = numbers[-keep:] if keep else []
        named = set()
        for number in numbers:
            try:
                named |= {entry["file"] for entry in self._checked(self._manifest(number))[1].values()}
            except ResultError:  # what belongs to it cannot be told: leave all parts
                return
        for path in [*self.folder.glob(f"{self.name}-*.safetensors"), *self.folder.glob(f".{self.name}-*.part")]:
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()


class Newer(ResultError):
    """Written by a later version: reading an older generation instead would lose what that one learned."""


def digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
