"""Who has opened the data set and the towers: makes the plan, and embeds shards of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cairn.data.catalogue import open_dataset
from cairn.data.images import Dataset, Images, Subset, rows_of
from cairn.data.loading import Loader
from cairn.data.stream import TaskStream, task_stream
from cairn.embed.plan import PLAN, ROWS, SPLITS, Chosen, EmbedConfig, Plan, Shard, shards_of
from cairn.errors import ConfigError, DataError, NotFinite, ResultError
from cairn.experiment.run import prompted, readable, towers_for
from cairn.experiment.schema import TowersUsed
from cairn.storage.tensors import read_tensors
from cairn.storage.versions import versions
from cairn.towers.fingerprint import same_towers
from cairn.towers.protocol import Towers


def planned(config: EmbedConfig, device: str | None = None) -> tuple[Plan, Maker, tuple[str, ...]]:
    """The plan, who can make it, and what the user should know. Raises a CairnError for any bad input."""
    run = config.run
    dataset = _images_of(config)
    dataset = prompted(dataset, config.template)
    stream = task_stream(
        dataset, step=max(1, len(dataset.classes)), limit_train=config.limit_train, limit_test=config.limit_test
    )
    towers = towers_for(run if device is None else run.model_copy(update={"device": device}), dataset)
    # What every machine then does: the arithmetic is part of the plan
    config = config.model_copy(update={"precision": towers.precision})
    (task,), (tests,) = stream.tasks, stream.tests
    train, test = _in_order(task.train, dataset.train), _in_order(tests, dataset.test)
    ordered = replace(stream, tasks=(replace(task, train=train),), tests=(test,))
    stream = readable(ordered, skip=config.on_bad_image == "skip")
    chosen = _chosen(stream, dataset)
    shards = shards_of(len(chosen.train), len(chosen.test), config.shard_rows)
    plan = Plan(
        config=config, split=stream.fingerprint,
        towers=TowersUsed(name=towers.name, fingerprint=towers.fingerprint, revision=towers.revision),
        dim=towers.dim, logit_scale=towers.logit_scale, classes=dataset.classes, templates=dataset.templates,
        train=len(chosen.train), test=len(chosen.test), images=tuple(chosen.identity(shard) for shard in shards),
        rows=chosen.sha256(), versions=versions(),
    )  # fmt: skip
    return plan, Maker(plan, chosen, towers), (*stream.notices, *towers.notices)


def _images_of(config: EmbedConfig) -> Dataset:
    dataset = open_dataset(config.data)
    if dataset.embeddings is not None:
        raise ConfigError(f"data '{config.data}': holds embeddings, not images: `cairn run` takes it as it is")
    return dataset


def _in_order(images: Images, source: Images) -> Subset:
    """As the data set has them; a stream's are class by class."""
    order = np.argsort(rows_of(images, source), kind="stable")
    return Subset(images, order, images.labels[order])


def _chosen(stream: TaskStream, dataset: Dataset) -> Chosen:
    def within(images: Images, source: Images) -> Subset:
        rows = rows_of(images, source)
        return Subset(source, rows, source.labels[rows])

    return Chosen(within(stream.tasks[0].train, dataset.train), within(stream.tests[0], dataset.test))


class Stale(DataError):
    """The images or the towers are not those that the plan names."""


class Maker:
    """Embeds shards of a plan: the data set and the towers, opened once."""

    def __init__(self, plan: Plan, chosen: Chosen, towers: Towers):
        self.plan, self.chosen, self.towers = plan, chosen, towers

    @classmethod
    def of(cls, plan: Plan, folder: Path, device: str | None = None) -> Maker:
        """From a plan that another process made. Raises Stale for towers that are not the plan's."""
        run = plan.config.run
        dataset = _images_of(plan.config)
        towers = towers_for(run if device is None else run.model_copy(update={"device": device}), dataset)
        if not same_towers(towers.fingerprint, plan.towers.fingerprint):
            raise Stale(
                f"towers '{towers.name}': {towers.fingerprint} here, {plan.towers.fingerprint} in '{folder / PLAN}'; give "
                "every machine the same"
            )
        if towers.precision != run.precision:
            raise Stale(
                f"{towers.notices[-1]}, but the plan in '{folder / PLAN}' has bfloat16; embed on other machines"
            )
        try:
            held = read_tensors(folder / f"{ROWS}.safetensors", plan.rows)
        except ResultError as error:
            raise Stale(str(error)) from None
        parts = []
        for split, source in zip(SPLITS, (dataset.train, dataset.test), strict=True):
            rows, labels = (held[f"{split}_{part}"].numpy() for part in ("rows", "labels"))
            if len(rows) and rows.max() >= len(source):
                raise Stale(f"data '{plan.config.data}': fewer images than '{folder / PLAN}' names")
            parts.append(Subset(source, rows, labels))
        return cls(plan, Chosen(*parts), towers)

    @torch.no_grad()
    def rows(self, shard: Shard, tell: Callable[[int], Any] = lambda rows: None) -> np.ndarray:
        """(n, d), in the precision that they are stored in. `tell` is called with the rows of every pass, and may raise.

        Raises Stale for other images than the plan's, NotFinite for a row that is no number.
        """
        images, plan, batch = self.chosen.part(shard), self.plan, self.plan.config.batch
        if self.chosen.identity(shard) != plan.images[shard.number]:
            raise Stale(
                f"data '{plan.config.data}': images of {shard.name} changed meanwhile; --overwrite to begin again"
            )
        made = np.empty((len(images), plan.dim), plan.dtype)
        done = 0
        for pixels, _ in Loader(images, self.towers.prepare, self.towers.pixels, batch=batch, cache_bytes=0):
            n = len(pixels)
            # In passes of one size a row depends neither on its neighbours nor on where the shard ends
            full = torch.cat([pixels, pixels[-1:].expand(batch - n, *pixels.shape[1:])])
            with np.errstate(over="ignore"):  # found below
                made[done : done + n] = self.towers.image(full)[:n].float().cpu().numpy()
            done += n
            tell(n)
        wrong = np.flatnonzero(~np.isfinite(made).all(axis=1))
        if len(wrong):
            remedy = "; store float32" if plan.config.dtype == "float16" else ""
            raise NotFinite(
                f"embedding of {images.describe(int(wrong[0]))} in {plan.config.dtype} is not finite{remedy}"
            )
        return made

    def texts(self) -> np.ndarray:
        """(k, d) float32, unit rows."""
        texts = self.towers.class_texts(self.plan.classes, self.plan.templates)
        return texts.float().cpu().numpy()
