"""A plan in its folder: what is there of it, what is missing, and the one file that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cairn.embed.maker import Maker
from cairn.embed.parts import Column, Parts, write_columns
from cairn.embed.plan import PLAN, ROWS, SPLITS, TEXT, Plan, Shard, stored_plan
from cairn.errors import ResultError
from cairn.storage.files import write_chunks, write_json
from cairn.training.log import Log

MADE_AS = "embedded"
"""Metadata key under which a file tells how it was made."""


class Work:
    """A plan in its folder: what is there of it, and what is missing."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder
        self.parts = Parts(folder, plan.key)
        self.sound: set[str] = set()
        """Parts that were read, or written, and found whole."""

    def held(self, shard: Shard) -> bool:
        if shard.name not in self.sound and self.read(shard) is not None:
            self.sound.add(shard.name)
        return shard.name in self.sound

    def read(self, shard: Shard) -> np.ndarray | None:
        return self.parts.read(shard.name, (shard.rows, self.plan.dim), self.plan.dtype)

    def missing(self) -> list[Shard]:
        return [shard for shard in self.plan.shards if not self.held(shard)]

    def make(self, maker: Maker, shard: Shard, tell: Callable[[int], Any] = lambda rows: None) -> None:
        self.parts.write(shard.name, maker.rows(shard, tell))
        self.sound.add(shard.name)

    def texts(self, maker: Maker) -> np.ndarray:
        """Made once, as a part: many templates of many classes take a while."""
        shape = (len(self.plan.classes), self.plan.dim)
        if (held := self.parts.read(TEXT, shape, np.dtype(np.float32))) is not None:
            return held
        made = maker.texts()
        self.parts.write(TEXT, made)
        return made

    def begin(self, maker: Maker, overwrite: bool, log: Log) -> None:
        """Put the plan there, or find it there. Raises ResultError where another one was begun."""
        stored = stored_plan(self.folder)
        if overwrite:
            self._forget_plan()
            self.parts.remove(self.parts.present() - {ROWS})  # other ranks may be reading the rows
        elif stored is not None and stored.key != self.plan.key:
            raise ResultError(
                f"'{self.folder}': begun with {self.plan.other_than(stored)}; give another --out, or --overwrite to begin again"
            )
        elif stored is not None:
            if stored.versions != self.plan.versions:
                then, now = stored.versions, self.plan.versions
                changed = ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key])
                log(
                    "warning",
                    text=f"versions changed since the shards were begun ({changed}): rows may differ in last bits",
                )
            return
        write_chunks(self.folder / f"{ROWS}.safetensors", maker.chosen.serialized())
        write_json(self.folder / PLAN, self.plan.model_dump(mode="json") | {"replaces": overwrite})

    def merge(self, maker: Maker, out: Path) -> int:
        """The features file of all parts; its bytes. Raises ResultError for a part that is damaged."""
        plan, columns = self.plan, {}
        for split in SPLITS:
            own = [shard for shard in plan.shards if shard.split == split]
            labels = getattr(maker.chosen, split).labels.astype(np.int64, copy=False)
            columns[f"{split}_labels"] = Column.of(labels)
            columns[f"{split}_features"] = Column(plan.dtype, (len(labels), plan.dim), map(self._sound, own))
        columns["text_features"] = Column.of(self.texts(maker))
        about = {
            "class_names": json.dumps(plan.classes, ensure_ascii=False),
            "templates": json.dumps(plan.templates, ensure_ascii=False),
            "logit_scale": repr(plan.logit_scale),
            "model": plan.towers.name,
            "fingerprint": plan.towers.fingerprint,
            MADE_AS: json.dumps({"plan": plan.key, "split": plan.split, "config": plan.config.model_dump(mode="json")},
                                ensure_ascii=False),
        }  # fmt: skip
        return write_columns(out, columns, about)

    def _sound(self, shard: Shard) -> np.ndarray:
        rows = self.read(shard)
        if rows is None:
            self.sound.discard(shard.name)
            raise ResultError(f"'{self.parts.path(shard.name)}': damaged; the same call makes it again")
        return rows

    def clear(self) -> None:
        """Remove what is no longer needed, the folder last if nothing else is in it."""
        self._forget_plan()
        self.parts.clear()
        with suppress(OSError):
            self.folder.rmdir()

    def _forget_plan(self) -> None:
        with suppress(OSError):
            (self.folder / PLAN).unlink()
