"""What is to be embedded and how: the same for all who take part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from cairn.data.feature_store import image_ids
from cairn.data.images import Subset
from cairn.errors import ResultError
from cairn.experiment.schema import OnBadImage, RunConfig, TowersUsed, comparable_call
from cairn.storage.archive import digest
from cairn.storage.files import read_json
from cairn.storage.schema import Amount, Count, validated
from cairn.storage.tensors import serialized

PLAN, ROWS, TEXT = "plan.json", "rows", "text"
SPLITS = ("train", "test")


class EmbedConfig(BaseModel):
    """Everything that decides what is in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "shapes"
    towers: str = "auto"
    limit_train: int | None = None
    limit_test: int | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    preprocess: Literal["crop", "squash"] | None = None
    template: str | None = None
    on_bad_image: OnBadImage = "error"
    revision: str | None = None
    dtype: Literal["float32", "float16"] = Field(default="float32", description="what the rows are stored in")
    shard_rows: int = Field(default=2048, ge=1, description="images per shard")
    batch: int = Field(default=128, ge=1, description="images in a pass through the tower")

    @property
    def run(self) -> RunConfig:
        """A run that takes the same images and towers."""
        shared = self.model_fields_set & RunConfig.model_fields.keys()
        return RunConfig(method="zero-shot", **{key: getattr(self, key) for key in shared})


class Shard(NamedTuple):
    number: int
    name: str
    split: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Plan(BaseModel):
    """What is to be made, the same for all who take part. Equal keys, equal files, up to the order in which sums are made."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    config: EmbedConfig
    split: str = Field(description="fingerprint of which images there are, and of their classes")
    towers: TowersUsed
    dim: Count
    logit_scale: Amount
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Count = Field(description="training images")
    test: Count
    images: tuple[str, ...] = Field(description="what the images of each shard are: a hash of their identities")
    rows: str = Field(description="SHA-256 of the file of rows")
    # No part of the key:
    versions: dict[str, str]
    replaces: bool = Field(default=False, description="whether the file that is there is to be replaced by this one")

    @cached_property
    def key(self) -> str:
        held = self.model_dump(mode="json", exclude={"versions", "replaces"})
        return digest(held | {"config": comparable_call(held["config"])})[:32]

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return shards_of(self.train, self.test, self.config.shard_rows)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.config.dtype)

    def other_than(self, stored: Plan) -> str:
        """What keeps two plans from being one, in words."""
        ours, theirs = (comparable_call(plan.config.model_dump()) for plan in (self, stored))
        for key in ours:
            if ours[key] != theirs[key]:
                return f"{key.replace('_', '-')} {theirs[key]}, not {ours[key]}"
        if self.towers != stored.towers:
            return f"towers {stored.towers.fingerprint}, which are {self.towers.fingerprint} today"
        return "other images"


def shards_of(train: int, test: int, size: int) -> tuple[Shard, ...]:
    places = [
        (f"{split}-{number:06d}", split, start, min(start + size, rows))
        for split, rows in zip(SPLITS, (train, test), strict=True)
        for number, start in enumerate(range(0, rows, size))
    ]
    return tuple(Shard(number, *place) for number, place in enumerate(places))


class Chosen(NamedTuple):
    """The images to embed, in data set order, and where they lie in the data set."""

    train: Subset
    test: Subset

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{split}_{part}": torch.from_numpy(np.asarray(values, dtype=np.int64))
            for split, images in zip(SPLITS, self, strict=True)
            for part, values in (("rows", images.indices), ("labels", images.labels))
        }

    def part(self, shard: Shard) -> Subset:
        """The images of one shard."""
        images = getattr(self, shard.split)
        some = slice(shard.start, shard.stop)
        return Subset(images.source, images.indices[some], images.labels[some])

    def identity(self, shard: Shard) -> str:
        """A hash of which images those are."""
        return hashlib.blake2b(image_ids(self.part(shard)).tobytes(), digest_size=16).hexdigest()

    def sha256(self) -> str:
        """Of the file of rows."""
        running = hashlib.sha256()
        for piece in self.serialized():
            running.update(piece)
        return running.hexdigest()

    def serialized(self) -> Iterator[bytes]:
        return serialized(self.tensors())


def stored_plan(folder: Path) -> Plan | None:
    """The plan that was begun in a folder, None if there is none, or none that can be read: its shards are then nobody's."""
    try:
        return validated(Plan, read_json(folder / PLAN), f"'{folder / PLAN}'")
    except ResultError:
        return None
