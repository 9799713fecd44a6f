"""Shards of a plan: made from the images by the towers, kept as files, and merged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.data.feature_store import image_ids
from cairn.data.images import Dataset, LabelSets, Subset, rows_of
from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.stream import TaskStream, task_stream
from cairn.embed.plan import MADE_AS, PLAN, SPLITS, EmbedConfig, MadeAs, Plan, Shard, stored_plan
from cairn.errors import ConfigError, DataError, NotFinite, ResultError
from cairn.experiment.inputs import prompted, readable, towers_for
from cairn.experiment.schema import TowersUsed
from cairn.storage.files import atomic_write, write_chunks, write_json
from cairn.storage.tensors import Layout, TensorFile, TensorWriter, serialized
from cairn.storage.versions import versions
from cairn.towers.fingerprint import same_towers
from cairn.towers.protocol import Towers
from cairn.training.log import Log

NAME = re.compile(r"\.?(train|test)-[0-9]{6,}\.safetensors(\..*\.part)?")
"""Files of shards, also those that a killed writer left. Nothing else in the folder is ours."""


class Maker:
    """Embeds the images of a plan: the data set and the towers, opened once."""

    def __init__(self, plan: Plan, images: Mapping[str, Subset], towers: Towers):
        self.plan, self.images, self.towers = plan, images, towers

    @classmethod
    def of(cls, plan: Plan) -> Maker:
        """From the plan of another process. Raises DataError for towers that are not the plan's."""
        dataset = _opened(plan.config)
        towers = towers_for(plan.config.run, dataset)
        if not same_towers(towers.fingerprint, plan.towers.fingerprint) or towers.precision != plan.config.precision:
            raise DataError(
                f"towers '{towers.name}': {towers.fingerprint} in {towers.precision} here, {plan.towers.fingerprint} in "
                f"{plan.config.precision} in the plan; give every machine the same"
            )
        return cls(plan, _chosen(_in_order(plan.config, dataset), plan.left_out), towers)

    def _part(self, shard: Shard) -> Subset:
        images, some = self.images[shard.split], slice(shard.start, shard.stop)
        return Subset(images.source, images.indices[some], images.labels[some])

    def identity(self, shard: Shard) -> str:
        """A hash of which images the shard has."""
        return hashlib.blake2b(image_ids(self._part(shard)).tobytes(), digest_size=16).hexdigest()

    @torch.no_grad()
    def rows(self, shard: Shard, passed: Callable[[int], Any] = lambda rows: None) -> np.ndarray:
        """(n, d), in the precision that they are stored in. `passed` is called with the rows of every pass, and may raise.

        Raises DataError for other images than the plan's, NotFinite for a row that is no number.
        """
        images, plan, batch = self._part(shard), self.plan, self.plan.config.batch
        if self.identity(shard) != plan.images[shard.number]:
            raise DataError(
                f"data '{plan.config.data}': images of {shard.name} changed meanwhile; --overwrite to begin again"
            )
        made, done = np.empty((len(images), plan.dim), plan.dtype), 0
        for pixels, _ in Loader(images, self.towers.prepare, self.towers.pixels, batch=batch, cache_bytes=0):
            n = len(pixels)
            # In passes of one size a row depends neither on its neighbours nor on where the shard ends
            full = torch.cat([pixels, pixels[-1:].expand(batch - n, *pixels.shape[1:])])
            with np.errstate(over="ignore"):  # found below
                made[done : done + n] = self.towers.image(full)[:n].float().cpu().numpy()
            done += n
            passed(n)
        wrong = np.flatnonzero(~np.isfinite(made).all(axis=1))
        if len(wrong):
            remedy = "; store float32" if plan.config.dtype == "float16" else ""
            raise NotFinite(
                f"embedding of {images.describe(int(wrong[0]))} in {plan.config.dtype} is not finite{remedy}"
            )
        return made

    def texts(self) -> np.ndarray:
        """(k, d) float32, unit rows."""
        return self.towers.class_texts(self.plan.classes, self.plan.templates).float().cpu().numpy()


def planned(config: EmbedConfig, device: torch.device | None = None) -> tuple[Maker, tuple[str, ...]]:
    """Who can make the plan of a call, and what the user should know. Raises a CairnError for any bad input."""
    dataset = prompted(_opened(config), config.template)
    ordered = _in_order(config, dataset)
    run = config.run
    towers = towers_for(run if device is None else run.model_copy(update={"device": str(device)}), dataset)
    # What every machine then does: the arithmetic is part of the plan
    config = config.model_copy(update={"precision": towers.precision})
    stream = readable(ordered, skip=config.on_bad_image == "skip")
    left_out = {}
    for split, all_, some in zip(SPLITS, ordered.collections, stream.collections, strict=True):
        taken = np.arange(len(all_)) if some is all_ else rows_of(some, all_)
        left_out[split] = tuple(np.setdiff1d(np.arange(len(all_)), taken).tolist())
    images = _chosen(ordered, left_out)
    plan = Plan(
        config=config,
        split=stream.fingerprint,
        towers=TowersUsed(name=towers.name, fingerprint=towers.fingerprint, revision=towers.revision),
        dim=towers.dim,
        logit_scale=towers.logit_scale,
        classes=dataset.classes,
        templates=dataset.templates,
        left_out=left_out,
        train=len(images["train"]),
        test=len(images["test"]),
        images=(),  # below
        versions=versions(),
    )
    maker = Maker(plan, images, towers)
    maker.plan = plan.model_copy(update={"images": tuple(map(maker.identity, plan.shards))})
    return maker, (*stream.notices, *towers.notices)


def _opened(config: EmbedConfig) -> Dataset:
    dataset = open_dataset(config.data)
    if dataset.embeddings is not None:
        raise ConfigError(f"data '{config.data}': holds embeddings, not images: `cairn run` takes it as it is")
    return dataset


def _in_order(config: EmbedConfig, dataset: Dataset) -> TaskStream:
    """All classes as one task, with the images in data set order; a stream's are class by class."""
    step = max(1, len(dataset.classes))
    stream = task_stream(dataset, step=step, limit_train=config.limit_train, limit_test=config.limit_test)
    parts = []
    for source, images in zip((dataset.train, dataset.test), stream.collections, strict=True):
        rows = np.sort(rows_of(images, source))
        parts.append(Subset(source, rows, source.labels[rows]))
    train, test = parts
    return replace(stream, tasks=(replace(stream.tasks[0], train=train),), tests=(test,))


def _labels(images: Subset) -> np.ndarray:
    """As a features file has them: int64 (n,), or uint8 (n, k) where images may show several classes."""
    if isinstance(images.source, LabelSets):
        return images.source.targets[images.indices].astype(np.uint8)
    return images.labels.astype(np.int64, copy=False)


def _chosen(ordered: TaskStream, left_out: Mapping[str, tuple[int, ...]]) -> dict[str, Subset]:
    found = {}
    for split, images in zip(SPLITS, ordered.collections, strict=True):
        assert isinstance(images, Subset)
        rows = np.delete(images.indices, left_out[split])
        found[split] = Subset(images.source, rows, images.source.labels[rows])
    return found


class Shards:
    """The folder of a plan: what is there of it, and what is missing. Two writers of one shard write the same."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder

    def path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.safetensors"

    def require_same_plan(self, log: Log) -> None:
        """Raises ResultError where the folder was begun with another plan."""
        stored = stored_plan(self.folder)
        if stored is None:
            return
        if stored.key != self.plan.key:
            raise ResultError(
                f"'{self.folder}': begun with {self.plan.difference(stored)}; give another --out, or --overwrite to begin again"
            )
        then, now = stored.versions, self.plan.versions
        if changed := ", ".join(f"{key} {then.get(key)} -> {now[key]}" for key in now if then.get(key) != now[key]):
            log(
                "warning",
                text=f"versions changed since the shards were begun ({changed}): rows may differ in last bits",
            )

    def begin(self) -> list[Shard]:
        """Keep the plan; the shards that are missing."""
        write_json(self.folder / PLAN, self.plan.model_dump(mode="json"))
        return [shard for shard in self.plan.shards if self.read(shard) is None]

    def make(self, maker: Maker, shard: Shard, passed: Callable[[int], Any] = lambda rows: None) -> None:
        rows = np.ascontiguousarray(maker.rows(shard, passed))
        about = {"plan": self.plan.key, "sha256": hashlib.sha256(rows.data).hexdigest()}
        write_chunks(self.path(shard), serialized({"rows": torch.from_numpy(rows)}, about))

    def read(self, shard: Shard) -> np.ndarray | None:
        """The rows; None if they are not there, not whole, or of another plan."""
        try:
            file = TensorFile(self.path(shard))
        except ResultError:
            return None
        about = file.header.metadata
        if about.get("plan") != self.plan.key or "rows" not in file:
            return None
        rows = np.array(file.array("rows"))
        if rows.shape != (shard.rows, self.plan.dim) or rows.dtype != self.plan.dtype:
            return None
        return rows if hashlib.sha256(rows.data).hexdigest() == about.get("sha256") else None

    def merge(self, maker: Maker, out: Path) -> int:
        """The features file of all shards, one of them in memory at a time; its bytes. Raises ResultError for a shard that is
        damaged."""
        plan, texts = self.plan, maker.texts()
        layouts = {"text_features": Layout.of(texts.dtype, texts.shape)}
        for split, images in maker.images.items():
            layouts[f"{split}_labels"] = Layout.of(_labels(images).dtype, _labels(images).shape)
            layouts[f"{split}_features"] = Layout.of(plan.dtype, (len(images), plan.dim))
        made_as = MadeAs(plan=plan.key, split=plan.split, config=plan.config)
        about = {
            "class_names": json.dumps(plan.classes, ensure_ascii=False),
            "templates": json.dumps(plan.templates, ensure_ascii=False),
            "logit_scale": repr(plan.logit_scale),
            "model": plan.towers.name,
            "fingerprint": plan.towers.fingerprint,
            MADE_AS: json.dumps(made_as.model_dump(mode="json"), ensure_ascii=False),
        }
        with atomic_write(out) as temporary:
            with temporary.open("wb") as file:
                writer = TensorWriter(file, layouts, about)
                writer.append("text_features", texts)
                for split, images in maker.images.items():
                    writer.append(f"{split}_labels", _labels(images))
                for shard in plan.shards:
                    if (rows := self.read(shard)) is None:
                        raise ResultError(f"'{self.path(shard)}': damaged; the same call makes it again")
                    writer.append(f"{shard.split}_features", rows)
                writer.close()
            TensorFile(temporary)  # it reads back, or the disk is not to be trusted
        return writer.size

    def present(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if NAME.fullmatch(path.name)]

    def clear(self) -> None:
        """Remove plan and shards, and the folder if nothing else is in it."""
        for path in (self.folder / PLAN, *self.present()):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()
