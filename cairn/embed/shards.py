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
from cairn.data.images import Dataset, Images, LabelSets, Subset, reduced, rows_of
from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.same_files import repeats
from cairn.data.stream import TaskStream, task_stream
from cairn.embed.plan import MADE_AS, PLAN, SPLITS, EmbedConfig, MadeAs, Plan, Shard
from cairn.errors import ConfigError, DataError, NotFinite, ResultError
from cairn.experiment.inputs import prompted, readable, towers_for
from cairn.experiment.schema import TowersUsed
from cairn.storage.files import atomic_write, write_chunks
from cairn.storage.tensors import Layout, TensorFile, TensorWriter, serialized
from cairn.storage.versions import versions
from cairn.towers.fingerprint import same_towers
from cairn.towers.preprocessing import decoded_side
from cairn.towers.protocol import Towers

NAME = re.compile(r"\.?(train|test)-[0-9]{6,}\.safetensors(\..*\.part)?")
"""Files of shards, also those that a killed writer left. Nothing else in the folder is ours."""


def _unheard(rows: int) -> None:
    """Nobody asks how far it is."""


class Embedding:
    """A plan carried out: images and towers, opened once, and the folder of the shards. Two writers of one shard write the
    same."""

    def __init__(self, plan: Plan, images: Mapping[str, Subset], towers: Towers, folder: Path):
        self.plan, self.images, self.towers, self.folder = plan, images, towers, folder

    @classmethod
    def of(cls, plan: Plan, folder: Path) -> Embedding:
        """From the plan of another process. Raises DataError for towers that are not the plan's."""
        dataset = _opened(plan.config)
        towers = towers_for(plan.config.run, dataset)
        if not same_towers(towers.fingerprint, plan.towers.fingerprint) or towers.precision != plan.config.precision:
            raise DataError(
                f"towers '{towers.name}': {towers.fingerprint} in {towers.precision} here, {plan.towers.fingerprint} in "
                f"{plan.config.precision} in the plan; give every machine the same"
            )
        return cls(plan, _chosen(_in_order(plan.config, dataset), plan.left_out), towers, folder)

    def part(self, shard: Shard) -> Subset:
        images, some = self.images[shard.split], slice(shard.start, shard.stop)
        return Subset(images.source, images.indices[some], images.labels[some])

    def identity(self, shard: Shard) -> str:
        """A hash of which images the shard has."""
        return hashlib.blake2b(image_ids(self.part(shard)).tobytes(), digest_size=16).hexdigest()

    @torch.no_grad()
    def rows(self, shard: Shard, passed: Callable[[int], Any]) -> np.ndarray:
        """(n, d), in the precision that they are stored in. `passed` is called with the rows of every pass, and may raise.

        Raises DataError for other images than the plan's, NotFinite for a row that is no number.
        """
        images, config = reduced(self.part(shard), decoded_side(self.towers)), self.plan.config
        if self.identity(shard) != self.plan.images[shard.number]:
            raise DataError(
                f"data '{config.data}': images of {shard.name} changed meanwhile; --overwrite to begin again"
            )
        made, done = np.empty((len(images), self.plan.dim), self.plan.dtype), 0
        for pixels, _ in Loader(images, self.towers.prepare, self.towers.pixels, batch=config.batch, cache_bytes=0):
            n = len(pixels)
            # In passes of one size a row depends neither on its neighbours nor on where the shard ends
            full = torch.cat([pixels, pixels[-1:].expand(config.batch - n, *pixels.shape[1:])])
            with np.errstate(over="ignore"):  # found below
                made[done : done + n] = self.towers.image(full)[:n].float().cpu().numpy()
            done += n
            passed(n)
        if len(wrong := np.flatnonzero(~np.isfinite(made).all(axis=1))):
            remedy = "; store float32" if config.dtype == "float16" else ""
            raise NotFinite(f"embedding of {images.describe(int(wrong[0]))} in {config.dtype} is not finite{remedy}")
        return made

    def texts(self) -> np.ndarray:
        """(k, d) float32, unit rows."""
        return self.towers.class_texts(self.plan.classes, self.plan.templates).float().cpu().numpy()

    # files

    def path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.safetensors"

    def make(self, shard: Shard, passed: Callable[[int], Any] = _unheard) -> None:
        rows = self.rows(shard, passed)
        about = {"plan": self.plan.key, "sha256": hashlib.sha256(rows.data).hexdigest()}
        write_chunks(self.path(shard), serialized({"rows": torch.from_numpy(rows)}, about))

    def read(self, shard: Shard) -> np.ndarray | None:
        """The rows; None if they are not there, not whole, or of another plan."""
        try:
            file = TensorFile(self.path(shard))
            rows = np.array(file.array("rows"))
        except (ResultError, KeyError, TypeError):
            return None
        about = {"plan": self.plan.key, "sha256": hashlib.sha256(rows.data).hexdigest()}
        whole = rows.shape == (shard.rows, self.plan.dim) and rows.dtype == self.plan.dtype
        return rows if whole and file.header.metadata == about else None

    def merge(self, out: Path) -> int:
        """The features file of all shards, one of them in memory at a time; its bytes. Raises ResultError for a shard that is
        damaged."""
        plan, whole = self.plan, {"text_features": self.texts()}
        whole |= {f"{split}_labels": _labels(images) for split, images in self.images.items()}
        layouts = {name: Layout.of(values.dtype, values.shape) for name, values in whole.items()}
        for split, images in self.images.items():
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
                for name, values in whole.items():
                    writer.append(name, values)
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
        """Remove plan and shards, and nothing else."""
        for path in (self.folder / PLAN, *self.present()):
            with suppress(OSError):
                path.unlink()


def planned(config: EmbedConfig, folder: Path, device: torch.device | None = None) -> tuple[Embedding, tuple[str, ...]]:
    """What a call is to do, and what the user should know. Raises a CairnError for any bad input."""
    dataset = prompted(_opened(config), config.template)
    ordered, run = _in_order(config, dataset), config.run
    towers = towers_for(run if device is None else run.model_copy(update={"device": str(device)}), dataset)
    stream = readable(ordered, skip=config.on_bad_image == "skip")
    left_out = {}
    for split, all_, some in zip(SPLITS, ordered.collections, stream.collections, strict=True):
        left_out[split] = tuple(np.setdiff1d(np.arange(len(all_)), rows_of(some, all_)).tolist())
    images = _chosen(ordered, left_out)
    plan = Plan(
        # What every machine then does: the arithmetic is part of the plan
        config=config.model_copy(update={"precision": towers.precision}),
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
    embedding = Embedding(plan, images, towers, folder)
    embedding.plan = plan.model_copy(update={"images": tuple(map(embedding.identity, plan.shards))})
    return embedding, (*stream.notices, *repeats(stream), *towers.notices)


def _opened(config: EmbedConfig) -> Dataset:
    dataset = open_dataset(config.data)
    if dataset.embeddings is not None:
        raise ConfigError(f"data '{config.data}': holds embeddings, not images: `cairn run` takes it as it is")
    return dataset


def _in_order(config: EmbedConfig, dataset: Dataset) -> TaskStream:
    """All classes as one task, with the images in data set order; a stream's are class by class."""
    step = max(1, len(dataset.classes))
    stream = task_stream(dataset, step=step, limit_train=config.limit_train, limit_test=config.limit_test)
    train, test = (
        _subset(source, np.sort(rows_of(images, source)))
        for source, images in zip((dataset.train, dataset.test), stream.collections, strict=True)
    )
    return replace(stream, tasks=(replace(stream.tasks[0], train=train),), tests=(test,))


def _chosen(ordered: TaskStream, left_out: Mapping[str, tuple[int, ...]]) -> dict[str, Subset]:
    found = {}
    for split, images in zip(SPLITS, ordered.collections, strict=True):
        assert isinstance(images, Subset)
        found[split] = _subset(images.source, np.delete(images.indices, left_out[split]))
    return found


def _subset(source: Images, rows: np.ndarray) -> Subset:
    return Subset(source, rows, source.labels[rows])


def _labels(images: Subset) -> np.ndarray:
    """As a features file has them: int64 (n,), or uint8 (n, k) where images may show several classes."""
    if isinstance(images.source, LabelSets):
        return images.source.targets[images.indices].astype(np.uint8)
    return images.labels.astype(np.int64, copy=False)
