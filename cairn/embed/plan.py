"""What is to be embedded and how: the same for all who take part."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cairn.errors import ResultError
from cairn.experiment.schema import OnBadImage, RunConfig, TowersUsed, comparable_call
from cairn.settings import Given
from cairn.storage.archive import digest
from cairn.storage.files import parsed_json, read_json
from cairn.storage.schema import Amount, Count, Record, validated

PLAN = "plan.json"
MADE_AS = "embedded"
SPLITS = ("train", "test")


class EmbedConfig(Given):
    """Everything that decides what is in the file."""

    data: str = "shapes"
    towers: str = "auto"
    limit_train: int | None = None
    limit_test: int | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    preprocess: Literal["crop", "squash"] | None = None
    decode: Literal["whole", "reduced"] = "whole"
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


class MadeAs(Record):
    """How a features file was made, as it tells in JSON under the metadata key `MADE_AS`."""

    plan: str = Field(description="key of the plan")
    split: str = Field(description="fingerprint of the images in it")
    config: EmbedConfig

    @classmethod
    def parsed(cls, metadata: Mapping[str, str]) -> MadeAs:
        """Raises ValueError or RecursionError for a file that another program made, or a damaged text."""
        return cls.model_validate(parsed_json(metadata.get(MADE_AS, "null").encode()))


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
    """Equal keys, equal files, up to the order in which sums are made."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[2] = 2
    config: EmbedConfig
    split: str = Field(description="fingerprint of which images there are, and of their classes")
    towers: TowersUsed
    dim: Count
    logit_scale: Amount
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    left_out: dict[str, tuple[Count, ...]] = Field(description="of each split, positions of images that cannot be read")
    train: Count = Field(description="training images")
    test: Count
    images: tuple[str, ...] = Field(description="what the images of each shard are: a hash of their identities")
    versions: dict[str, str] = Field(description="no part of the key")

    @cached_property
    def key(self) -> str:
        held, config = self.model_dump(mode="json", exclude={"versions"}), _comparable(self.config)
        if config["decode"] == "whole":  # as before there was any other
            del config["decode"]
        return digest(held | {"config": config})[:32]

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        size, found = self.config.shard_rows, []
        for split, rows in zip(SPLITS, (self.train, self.test), strict=True):
            for number, start in enumerate(range(0, rows, size)):
                found.append(Shard(len(found), f"{split}-{number:06d}", split, start, min(start + size, rows)))
        return tuple(found)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.config.dtype)

    def difference(self, stored: Plan) -> str:
        """What keeps two plans from being one, in words."""
        if differs := difference(self.config, stored.config):
            return differs
        if self.towers != stored.towers:
            return f"towers {stored.towers.fingerprint}, which are {self.towers.fingerprint} today"
        return "other images"


def _comparable(config: EmbedConfig) -> dict[str, Any]:
    """A config as it is compared with another. What only runs have is no part of it, so that keys stay as they are when runs
    have more."""
    held = config.model_dump(mode="json")
    return {key: value for key, value in comparable_call(held).items() if key in held}


def difference(config: EmbedConfig, stored: EmbedConfig) -> str | None:
    """The first option in which a stored config is another one."""
    ours, theirs = _comparable(config), _comparable(stored)
    for key, value in ours.items():
        if theirs[key] != value:
            return f"{key.replace('_', '-')} {theirs[key]}, not {value}"
    return None


def stored_plan(folder: Path) -> Plan | None:
    """The plan that was begun in a folder; None if there is none that can be read: its shards are then nobody's."""
    try:
        return validated(Plan, read_json(folder / PLAN), f"'{folder / PLAN}'")
    except ResultError:
        return None
