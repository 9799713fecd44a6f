"""Embeddings of a whole data set in one features file, made in shards by one process or many.

The plan says which images, which towers and how; it is the same for all who take part. A shard is so many rows of it: it is
made by whoever is free and lies beside the file until all are there. So nobody's death loses more than one shard, and who
made which leaves no trace in the file: every pass through the tower has the same number of images.

    FILE.parts/plan.json         the plan
    FILE.parts/rows.safetensors  which images of the data set, and their classes
    FILE.parts/train-000000...   the shards
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open

from cairn.archive import digest
from cairn.data.catalogue import open_dataset
from cairn.data.feature_store import image_ids
from cairn.data.images import Dataset, Images, Subset
from cairn.data.loading import Loader
from cairn.data.stream import TaskStream, task_stream
from cairn.embed_parts import Column, Parts, write_columns
from cairn.embed_workers import over_ray, ray_library
from cairn.errors import CairnError, ConfigError, DataError, NotFinite, ResultError, Stopped
from cairn.files import make_folder, read_json, write_chunks, write_json
from cairn.run import RunConfig, TowersUsed, _prompted, _readable, towers_for
from cairn.store import Lock
from cairn.tensors import read_tensors, serialized
from cairn.towers.protocol import Towers
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
from cairn.versions import versions

PLAN, ROWS, TEXT = "plan.json", "rows", "text"
SPLITS = ("train", "test")

MADE_AS = "embedded"
"""Metadata key under which a file tells how it was made."""

PATIENCE = 60.0
"""Seconds without a new shard after which rank 0 makes itself what is missing; three of its own shards, if that is longer."""

NO_PLAN = 3600.0
"""Seconds that another rank waits for the plan."""

POLL = 0.2


class EmbedConfig(BaseModel):
    """Everything that decides what is in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "shapes"
    towers: str = "auto"
    limit_train: int | None = None
    limit_test: int | None = None
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    preprocess: Literal["crop", "squash"] = "crop"
    template: str | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    revision: str | None = None
    dtype: Literal["float32", "float16"] = Field("float32", description="what the rows are stored in")
    shard_rows: int = Field(2048, ge=1, description="images per shard")
    batch: int = Field(128, ge=1, description="images in a pass through the tower")

    @property
    def run(self) -> RunConfig:
        """A run that takes the same images and towers."""
        shared = self.model_fields_set & RunConfig.model_fields.keys()
        return RunConfig(method="zero-shot", **{key: getattr(self, key) for key in shared})


class Rank(NamedTuple):
    """Which of several processes this one is, started at once as torchrun does it."""

    number: int = 0
    size: int = 1
    local: int = 0
    """Which of those on this machine."""


@dataclass(frozen=True)
class Embedded:
    """What was made: `images` are in the file, `made` of them were missing when it was called."""

    path: Path
    images: int
    dim: int
    made: int
    seconds: float
    bytes: int
    finished: bool = False
    """Whether the file was there before, made by the same call."""


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
    dim: int
    logit_scale: float
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: int = Field(description="training images")
    test: int
    images: tuple[str, ...] = Field(description="what the images of each shard are: a hash of their identities")
    rows: str = Field(description="SHA-256 of the file of rows")
    # No part of the key:
    versions: dict[str, str]
    replaces: bool = Field(False, description="whether the file that is there is to be replaced by this one")

    @cached_property
    def key(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"versions", "replaces"}))[:32]

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return _shards(self.train, self.test, self.config.shard_rows)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.config.dtype)

    def other_than(self, stored: Plan) -> str:
        """What keeps two plans from being one, in words."""
        ours, theirs = self.config.model_dump(), stored.config.model_dump()
        for key in ours:
            if ours[key] != theirs[key]:
                return f"{key.replace('_', '-')} {theirs[key]}, not {ours[key]}"
        if self.towers != stored.towers:
            return f"towers {stored.towers.fingerprint}, which are {self.towers.fingerprint} today"
        return "other images"


def _shards(train: int, test: int, size: int) -> tuple[Shard, ...]:
    places = [
        (f"{split}-{number:06d}", split, start, min(start + size, rows))
        for split, rows in zip(SPLITS, (train, test), strict=True)
        for number, start in enumerate(range(0, rows, size))
    ]
    return tuple(Shard(number, *place) for number, place in enumerate(places))


# --- planning ---------------------------------------------------------------------------------------------------------


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


def planned(config: EmbedConfig, device: str | None = None) -> tuple[Plan, Maker, tuple[str, ...]]:
    """The plan, who can make it, and what the user should know. Raises a CairnError for any bad input."""
    run = config.run
    dataset = _images_of(config)
    dataset = _prompted(dataset, config.template)
    stream = task_stream(
        dataset, step=max(1, len(dataset.classes)), limit_train=config.limit_train, limit_test=config.limit_test
    )
    towers = towers_for(run if device is None else run.model_copy(update={"device": device}), dataset)
    (task,), (tests,) = stream.tasks, stream.tests
    ordered = replace(stream, tasks=(replace(task, train=_in_order(task.train)),), tests=(_in_order(tests),))
    stream = _readable(ordered, skip=config.on_bad_image == "skip")
    chosen = _chosen(stream, dataset)
    shards = _shards(len(chosen.train), len(chosen.test), config.shard_rows)
    plan = Plan(
        config=config, split=stream.fingerprint,
        towers=TowersUsed(name=towers.name, fingerprint=towers.fingerprint, revision=getattr(towers, "revision", None)),
        dim=towers.dim, logit_scale=towers.logit_scale, classes=dataset.classes, templates=dataset.templates,
        train=len(chosen.train), test=len(chosen.test), images=[_identity(_part(chosen, shard)) for shard in shards],
        rows=_sha256(chosen), versions=versions(),
    )  # fmt: skip
    return plan, Maker(plan, chosen, towers), stream.notices


def _images_of(config: EmbedConfig) -> Dataset:
    dataset = open_dataset(config.data)
    if dataset.embeddings is not None:
        raise ConfigError(f"data '{config.data}': holds embeddings, not images: `cairn run` takes it as it is")
    return dataset


def _in_order(images: Subset) -> Subset:
    """As the data set has them; a stream's are class by class."""
    order = np.argsort(images.indices, kind="stable")
    return Subset(images.source, images.indices[order], images.labels[order])


def _chosen(stream: TaskStream, dataset: Dataset) -> Chosen:
    def within(images: Images, source: Images) -> Subset:
        rows = images.indices
        while (images := images.source) is not source:  # a subset of a subset, where some cannot be read
            rows = images.indices[rows]
        return Subset(source, rows, source.labels[rows])

    return Chosen(within(stream.tasks[0].train, dataset.train), within(stream.tests[0], dataset.test))


def _part(chosen: Chosen, shard: Shard) -> Subset:
    images = getattr(chosen, shard.split)
    some = slice(shard.start, shard.stop)
    return Subset(images.source, images.indices[some], images.labels[some])


def _identity(images: Images) -> str:
    return hashlib.blake2b(image_ids(images), digest_size=16).hexdigest()


def _sha256(chosen: Chosen) -> str:
    running = hashlib.sha256()
    for piece in serialized(chosen.tensors()):
        running.update(piece)
    return running.hexdigest()


def _device(config: EmbedConfig, rank: Rank) -> str | None:
    """Its own accelerator for each rank of a machine, where the call leaves the choice."""
    if rank.size > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{rank.local % torch.cuda.device_count()}"
    return None


# --- making -----------------------------------------------------------------------------------------------------------


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
        if towers.fingerprint != plan.towers.fingerprint:
            raise Stale(
                f"towers '{towers.name}': {towers.fingerprint} here, {plan.towers.fingerprint} in '{folder / PLAN}'; give "
                "every machine the same"
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
        images, plan, batch = _part(self.chosen, shard), self.plan, self.plan.config.batch
        if _identity(images) != plan.images[shard.number]:
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
        stored = _stored_plan(self.folder)
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
        write_chunks(self.folder / f"{ROWS}.safetensors", serialized(maker.chosen.tensors()))
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


def _stored_plan(folder: Path) -> Plan | None:
    """The plan that was begun in a folder, None if there is none, or none that can be read: its shards are then nobody's."""
    try:
        return Plan.model_validate(read_json(folder / PLAN))
    except (ResultError, ValidationError):
        return None


# --- one file ---------------------------------------------------------------------------------------------------------


def embed_dataset(
    config: EmbedConfig,
    out: Path,
    *,
    workers: int = 1,
    address: str | None = None,
    rank: Rank | None = None,
    keep_parts: bool = False,
    overwrite: bool = False,
    patience: float = PATIENCE,
    log: Log | None = None,
    checkpoint: Checkpoint | None = None,
) -> Embedded:
    """The features file `out` of a data set's images, which `features_dataset` reads.

    What a call that was cut off has made is not made again. `workers` above 1 are Ray's, at `address` or on this machine; or
    else processes that were started at once share the shards by their `rank`. Between passes `checkpoint` may stop it.
    Raises a CairnError for any bad input before anything is written, and ResultError where `out` holds, or was begun with,
    something else, unless `overwrite`.
    """
    log, checkpoint, rank = log or Log(), checkpoint or Checkpoint(), rank or Rank()
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: must end in .safetensors, by which `cairn run --data` knows it")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if workers > 1 and rank.size > 1:
        raise ConfigError(f"--workers {workers}: {rank.size} processes were started already; one of the two")
    if workers > 1:
        ray_library()
    folder = out.with_name(f"{out.name}.parts")
    if not overwrite and not _replacing(config, out, folder) and (done := _finished(config, out)) is not None:
        return done
    if out.is_dir():
        raise ResultError(f"'{out}': a folder; give the path of a file")
    if rank.number:
        try:
            return _followed(config, out, folder, rank, checkpoint)
        except Stopped:
            raise
        except CairnError as error:  # rank 0 tells of what is wrong with the call, but of this it does not know
            log("warning", text=f"rank {rank.number}: {error}")
            raise

    plan, maker, notices = planned(config, _device(config, rank))
    work, began = Work(plan, folder), time.perf_counter()
    with _written_by_one(work):
        work.begin(maker, overwrite, log)
        for text in notices:
            log("notice", text=text)
        missing = work.missing()
        log("begin", data=config.data, towers=plan.towers.name, train=plan.train, test=plan.test, dim=plan.dim,
            shards=len(plan.shards), there=len(plan.shards) - len(missing))  # fmt: skip
        _require_room(work, missing, log)
        progress = _Progress(plan, missing, log, checkpoint)
        if workers > 1 and missing:
            _over_workers(work, missing, workers, address, progress)
        else:
            mine = [shard for shard in missing if shard.number % rank.size == 0]
            slowest = _made(work, maker, mine, progress)
            if rank.size > 1:
                _awaited(work, progress, max(patience, 3 * slowest))
            _made(work, maker, work.missing(), progress)
        size = work.merge(maker, out)
        if not keep_parts:
            work.clear()
    seconds = time.perf_counter() - began
    return Embedded(out, plan.train + plan.test, plan.dim, sum(shard.rows for shard in missing), seconds, size)


def _replacing(config: EmbedConfig, out: Path, folder: Path) -> bool:
    """Whether a call that was to replace the file was cut off: the same one goes on, though the old file is there."""
    begun = _stored_plan(folder)
    return begun is not None and begun.replaces and begun.config == config and begun.key != _made_by(out)


def _require_room(work: Work, missing: Sequence[Shard], log: Log) -> None:
    """A warning where shards and file do not seem to fit: what a disk tells of itself may be wrong."""
    width = work.plan.dim * work.plan.dtype.itemsize
    needed = width * (sum(shard.rows for shard in missing) + work.plan.train + work.plan.test)
    free = shutil.disk_usage(work.folder).free
    if free < needed:
        log("warning", text=f"'{work.folder}': shards and file take {needed:,} bytes, {free:,} are free")


def _finished(config: EmbedConfig, out: Path) -> Embedded | None:
    """What is there already. Raises ResultError if another call made it."""
    if not os.path.lexists(out):
        return None
    try:
        with safe_open(out, framework="numpy") as file:
            told = json.loads((file.metadata() or {})[MADE_AS])["config"]
            shapes = [file.get_slice(f"{split}_features").get_shape() for split in SPLITS]
    except Exception:  # whatever a parser makes of a file that may be anything
        raise ResultError(f"'{out}': not made by this command; give another --out or --overwrite") from None
    ours = config.model_dump(mode="json")
    if told != ours:
        key = next((key for key in ours if not isinstance(told, dict) or told.get(key) != ours[key]), "call")
        then = told.get(key) if isinstance(told, dict) else told
        raise ResultError(
            f"'{out}': made with {key.replace('_', '-')} {then}, not {ours.get(key)}; give another --out or --overwrite"
        )
    images = sum(rows for rows, _ in shapes)
    return Embedded(out, images, shapes[0][1], 0, 0.0, out.stat().st_size, finished=True)


@contextmanager
def _written_by_one(work: Work) -> Iterator[None]:
    """The folder, for one process that merges. Where it fails before there is a shard, nothing is left."""
    new = not work.folder.exists()
    make_folder(work.folder)
    lock = Lock(work.folder).take()
    try:
        yield
    except BaseException:
        if new and not work.parts.present() - {ROWS, TEXT}:
            work.clear()
        raise
    finally:
        lock.release()
        with suppress(OSError):
            work.folder.rmdir()


class _Progress:
    """How many rows are there, and how fast they come."""

    def __init__(self, plan: Plan, missing: Sequence[Shard], log: Log, checkpoint: Checkpoint):
        self.log, self.checkpoint = log, checkpoint
        self._images = plan.train + plan.test
        self._missing = {shard.name: shard.rows for shard in missing}
        self._missed, self._began, self._under_way = sum(self._missing.values()), time.perf_counter(), 0

    def passed(self, rows: int) -> None:
        """Rows of the shard that is being made."""
        self._under_way += rows
        self._show()

    def made(self, names: Iterable[str]) -> None:
        """Shards that are there now, here or there."""
        for name in names:
            self._missing.pop(name, None)
        self._under_way = 0
        self._show()

    def _show(self) -> None:
        """Raises Stopped if it was asked to stop."""
        missing = sum(self._missing.values()) - self._under_way
        rate = (self._missed - missing) / max(time.perf_counter() - self._began, 1e-9)
        remaining = missing / rate if rate > 0 else float("inf")
        self.log.progress(done=self._images - missing, images=self._images, rate=rate, remaining=remaining)
        self.checkpoint.poll()


def _made(work: Work, maker: Maker, shards: Sequence[Shard], progress: _Progress) -> float:
    """Seconds that the slowest took. What another process makes meanwhile is left to it."""
    slowest = 0.0
    for shard in shards:
        if not work.held(shard):
            began = time.perf_counter()
            work.make(maker, shard, progress.passed)
            slowest = max(slowest, time.perf_counter() - began)
        progress.made(work.parts.present())
    return slowest


def _awaited(work: Work, progress: _Progress, patience: float) -> None:
    """Wait for the shards of other processes: until all are there, or none has come for `patience` seconds."""
    missing, since = work.missing(), time.monotonic()
    while missing and time.monotonic() - since < patience:
        progress.checkpoint.poll()
        time.sleep(POLL)
        there = work.parts.present()
        left = [shard for shard in missing if shard.name not in there or not work.held(shard)]
        if len(left) < len(missing):
            missing, since = left, time.monotonic()
            progress.made(there)
    if missing:
        progress.log(
            "warning", text=f"no shard from the other processes for {patience:.0f} s: {len(missing)} are made here"
        )


def _over_workers(work: Work, missing: Sequence[Shard], workers: int, address: str | None, progress: _Progress) -> None:
    opened = partial(_opened, work.folder.resolve())
    made = over_ray(
        opened, [shard.name for shard in missing], workers=workers, address=address, accelerator=work.plan.config.device != "cpu",
        log=progress.log, poll=progress.checkpoint.poll,
    )  # fmt: skip
    for name in made:
        work.sound.add(name)
        progress.made([name])


def _opened(folder: Path) -> Callable[[str], None]:
    """What a worker elsewhere does with the name of a shard."""
    plan = _stored_plan(folder)
    if plan is None:
        raise ResultError(f"'{folder / PLAN}': not there; workers need a folder that every machine sees")
    work, maker = Work(plan, folder), Maker.of(plan, folder)
    shards = {shard.name: shard for shard in plan.shards}
    return lambda name: work.make(maker, shards[name])


# --- the other ranks --------------------------------------------------------------------------------------------------


def _followed(config: EmbedConfig, out: Path, folder: Path, rank: Rank, checkpoint: Checkpoint) -> Embedded:
    """What a rank other than 0 does: its shards of the plan that rank 0 puts there."""
    stale: dict[str, Stale] = {}
    while True:
        plan = _awaited_plan(config, out, folder, stale, checkpoint)
        began, made = time.perf_counter(), 0
        work = Work(plan, folder)
        try:
            maker = Maker.of(plan, folder, _device(config, rank))
            for shard in plan.shards[rank.number :: rank.size]:
                checkpoint.poll()
                if not work.held(shard):
                    work.make(maker, shard, lambda _: checkpoint.poll())
                    made += shard.rows
        except Stale as error:  # a plan that rank 0 is about to replace; or it is this machine that has something else
            stale[plan.key] = error
            continue
        except ResultError:
            if not _merged(work, out):
                raise
        if _merged(work, out):  # rank 0 did not wait for this one: what came too late is nobody's
            work.clear()
        return Embedded(out, plan.train + plan.test, plan.dim, made, time.perf_counter() - began, 0)


def _merged(work: Work, out: Path) -> bool:
    """Whether the file was made and the shards given up."""
    return not (work.folder / PLAN).exists() and _made_by(out) == work.plan.key


def _awaited_plan(
    config: EmbedConfig, out: Path, folder: Path, stale: dict[str, Stale], checkpoint: Checkpoint
) -> Plan:
    """The plan of this call that rank 0 puts there, other than those that are stale here. Raises Stale where it was one of
    those that the file was made by, ResultError if none comes."""
    since = time.monotonic()
    while time.monotonic() - since < NO_PLAN:
        checkpoint.poll()
        plan = _stored_plan(folder)
        if plan is not None and plan.config == config and plan.key not in stale:
            return plan
        if plan is None and (made_by := _made_by(out)) in stale:
            raise stale[made_by]
        time.sleep(POLL)
    raise ResultError(f"'{folder / PLAN}': rank 0 has put no plan there for {NO_PLAN:.0f} s; start all ranks again")


def _made_by(out: Path) -> str | None:
    """The plan of the file that is there."""
    with suppress(Exception), safe_open(out, framework="numpy") as file:
        return json.loads((file.metadata() or {})[MADE_AS])["plan"]
    return None
