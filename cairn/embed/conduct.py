"""A features file from beginning to end: alone, over Ray's workers, or as one of several ranks."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from cairn.embed.maker import Maker, Stale, planned
from cairn.embed.on_ray import INSTEAD, over_ray
from cairn.embed.plan import PLAN, ROWS, SPLITS, TEXT, EmbedConfig, Plan, Shard, stored_plan
from cairn.embed.work import MADE_AS, Work
from cairn.errors import CairnError, ConfigError, Interrupted, ResultError, counted
from cairn.experiment.folder import Lock
from cairn.experiment.schema import comparable_call
from cairn.storage.files import make_folder
from cairn.storage.tensors import TensorFile
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
from cairn.training.ray_cluster import ray_module

PATIENCE = 60.0
"""Seconds without a new shard after which rank 0 makes itself what is missing; three of its own shards, if that is longer."""

NO_PLAN = 3600.0
"""Seconds that another rank waits for the plan."""

POLL = 0.2


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
        raise ConfigError(f"--workers {workers}: {counted(rank.size, 'process')} started already; leave --workers out")
    if workers > 1:
        ray_module(INSTEAD)
    folder = out.with_name(f"{out.name}.parts")
    if not overwrite and not _replacing(config, out, folder) and (done := _finished(config, out)) is not None:
        return done
    if out.is_dir():
        raise ResultError(f"'{out}': a folder; give the path of a file")
    if rank.number:
        try:
            return _followed(config, out, folder, rank, checkpoint)
        except Interrupted:
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
    begun = stored_plan(folder)
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
        header = TensorFile(out).header
        told = json.loads(header.metadata[MADE_AS])["config"]
        shapes = [header.tensors[f"{split}_features"][0].shape for split in SPLITS]
    except Exception:  # whatever a parser makes of a file that may be anything
        raise ResultError(f"'{out}': not made by this command; give another --out or --overwrite") from None
    ours = comparable_call(config.model_dump(mode="json"))
    told = comparable_call(told) if isinstance(told, dict) else told
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
        """Raises Interrupted if it was asked to stop."""
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
            "warning",
            text=f"no shard from the other processes for {patience:.0f} s: {counted(len(missing), 'shard')} made here",
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
    plan = stored_plan(folder)
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
        plan = stored_plan(folder)
        if plan is not None and plan.config == config and plan.key not in stale:
            return plan
        if plan is None and (made_by := _made_by(out)) in stale:
            raise stale[made_by]
        time.sleep(POLL)
    raise ResultError(f"'{folder / PLAN}': rank 0 has put no plan there for {NO_PLAN:.0f} s; start all ranks again")


def _made_by(out: Path) -> str | None:
    """The plan of the file that is there."""
    with suppress(Exception):
        return json.loads(TensorFile(out).header.metadata[MADE_AS])["plan"]
    return None


def _device(config: EmbedConfig, rank: Rank) -> str | None:
    """Its own accelerator for each rank of a machine, where the call leaves the choice."""
    if rank.size > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{rank.local % torch.cuda.device_count()}"
    return None
