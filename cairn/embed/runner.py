"""A features file from beginning to end: alone, by Ray's workers, or as one of several ranks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from cairn.embed.plan import SPLITS, EmbedConfig, MadeAs, Plan, Shard
from cairn.embed.shards import Maker, Shards, planned
from cairn.errors import GOES_ON, CairnError, ConfigError, ResultError, counted, first_line
from cairn.experiment.folder import Lock
from cairn.experiment.schema import comparable_call
from cairn.storage.files import make_folder
from cairn.storage.tensors import TensorFile
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
from cairn.training.ray_cluster import Cluster, ray_module

INSTEAD = "torchrun"
"""What makes a file with several processes where there is no Ray."""

LOSSES = 3
"""Times that a worker of Ray may die."""

PATIENCE = 60.0
"""Seconds without a new shard after which rank 0 makes itself what is missing; three of its own shards, if that is longer."""

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
    if workers > 1:
        if rank.size > 1:
            raise ConfigError(
                f"--workers {workers}: {counted(rank.size, 'process')} started already; leave --workers out"
            )
        ray_module(INSTEAD)
    if not overwrite and (done := _finished(config, out)) is not None:
        return done
    if out.is_dir():
        raise ResultError(f"'{out}': a folder; give the path of a file")
    before = _made_by(out)
    maker, notices = planned(config, _device(config, rank))
    plan, began = maker.plan, time.perf_counter()
    shards = Shards(plan, out.with_name(f"{out.name}.parts"))
    if not overwrite:
        shards.require_same_plan(log)
    mine = plan.shards[rank.number :: rank.size]
    if rank.number:
        made = _follow(shards, maker, mine, lambda: _made_by(out) not in (None, before), checkpoint)
        return Embedded(out, plan.train + plan.test, plan.dim, made, time.perf_counter() - began, 0)
    with _cleared_if_empty(shards):
        shards.begin()
        for text in notices:
            log("notice", text=text)
        missing = shards.missing()
        about = {
            "data": config.data,
            "towers": plan.towers.name,
            "train": plan.train,
            "test": plan.test,
            "dim": plan.dim,
        }
        log("begin", **about, shards=len(plan.shards), there=len(plan.shards) - len(missing))
        _warn_of_full_disk(shards, missing, log)
        progress = _Progress(plan, missing, log, checkpoint)
        if workers > 1 and missing:
            for shard in _made_by_workers(shards, missing, workers, address, progress):
                progress.made(shard)
        else:
            slowest = _make(shards, maker, [shard for shard in mine if shard in missing], progress)
            if rank.size > 1:
                _wait_for_ranks(shards, progress, max(patience, 3 * slowest))
                _make(shards, maker, shards.missing(), progress)
        size = shards.merge(maker, out)
        if not keep_parts:
            shards.clear()
    made, seconds = sum(shard.rows for shard in missing), time.perf_counter() - began
    return Embedded(out, plan.train + plan.test, plan.dim, made, seconds, size)


def _follow(
    shards: Shards, maker: Maker, mine: Sequence[Shard], merged: Callable[[], bool], checkpoint: Checkpoint
) -> int:
    """What a rank other than 0 does: its shards, unless rank 0 did not wait for them. How many rows it made."""
    make_folder(shards.folder)
    made = 0
    for shard in mine:
        checkpoint.poll()
        if merged():
            break
        if not shards.holds(shard):
            try:
                shards.make(maker, shard, lambda _: checkpoint.poll())
            except ResultError:
                if not merged():
                    raise
                break
            made += shard.rows
    if merged():
        shards.clear()
    return made


def _device(config: EmbedConfig, rank: Rank) -> str | None:
    """Its own accelerator for each rank of a machine, where the call leaves the choice."""
    if rank.size > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{rank.local % torch.cuda.device_count()}"
    return None


def _made_by(out: Path) -> tuple[str, int] | None:
    """The plan of the file that is there, and when it was written."""
    with suppress(CairnError, OSError, ValueError, RecursionError):
        return MadeAs.parsed(TensorFile(out).header.metadata).plan, out.stat().st_mtime_ns
    return None


def _finished(config: EmbedConfig, out: Path) -> Embedded | None:
    """What is there already. Raises ResultError if another call made it."""
    if not os.path.lexists(out):
        return None
    try:
        header = TensorFile(out).header
        theirs = comparable_call(MadeAs.parsed(header.metadata).config.model_dump(mode="json"))
        (train, dim), (test, _) = (header.tensors[f"{split}_features"][0].shape for split in SPLITS)
    except (CairnError, OSError, ValueError, KeyError, RecursionError):
        raise ResultError(f"'{out}': not made by this command; give another --out or --overwrite") from None
    ours = comparable_call(config.model_dump(mode="json"))
    for key in ours:
        if theirs[key] != ours[key]:
            raise ResultError(
                f"'{out}': made with {key.replace('_', '-')} {theirs[key]}, not {ours[key]}; give another --out or --overwrite"
            )
    return Embedded(out, train + test, dim, 0, 0.0, out.stat().st_size, finished=True)


@contextmanager
def _cleared_if_empty(shards: Shards) -> Iterator[None]:
    """The folder, for one process that merges. Where it fails before there is a shard, nothing is left."""
    make_folder(shards.folder)
    lock = Lock(shards.folder).take()
    try:
        yield
    except BaseException:
        if not shards.present():
            shards.clear()
        raise
    finally:
        lock.release()
        with suppress(OSError):
            shards.folder.rmdir()


def _warn_of_full_disk(shards: Shards, missing: Sequence[Shard], log: Log) -> None:
    """A warning alone: what a disk tells of itself may be wrong."""
    plan = shards.plan
    needed = plan.dim * plan.dtype.itemsize * (sum(shard.rows for shard in missing) + plan.train + plan.test)
    free = shutil.disk_usage(shards.folder).free
    if free < needed:
        log("warning", text=f"'{shards.folder}': shards and file take {needed:,} bytes, {free:,} are free")


class _Progress:
    """How many rows are there, and how fast they come."""

    def __init__(self, plan: Plan, missing: Sequence[Shard], log: Log, checkpoint: Checkpoint):
        self.log, self.checkpoint, self._images, self._missing = log, checkpoint, plan.train + plan.test, set(missing)
        self._missed, self._began, self._under_way = sum(shard.rows for shard in missing), time.perf_counter(), 0

    def passed(self, rows: int) -> None:
        """Rows of the shard that is being made. Raises Interrupted if it was asked to stop."""
        self._under_way += rows
        missing = sum(shard.rows for shard in self._missing) - self._under_way
        rate = (self._missed - missing) / max(time.perf_counter() - self._began, 1e-9)
        remaining = missing / rate if rate > 0 else float("inf")
        self.log.progress(done=self._images - missing, images=self._images, rate=rate, remaining=remaining)
        self.checkpoint.poll()

    def made(self, shard: Shard) -> None:
        """A shard that is there now."""
        self._missing.discard(shard)
        self._under_way = 0
        self.passed(0)


def _make(shards: Shards, maker: Maker, own: Sequence[Shard], progress: _Progress) -> float:
    """Seconds that the slowest took. What another process makes meanwhile is left to it."""
    slowest = 0.0
    for shard in own:
        if not shards.holds(shard):
            began = time.perf_counter()
            shards.make(maker, shard, progress.passed)
            slowest = max(slowest, time.perf_counter() - began)
        progress.made(shard)
    return slowest


def _wait_for_ranks(shards: Shards, progress: _Progress, patience: float) -> None:
    """For the shards of other processes: until all are there, or none has come for `patience` seconds."""
    missing, since = shards.missing(), time.monotonic()
    while missing and time.monotonic() - since < patience:
        progress.checkpoint.poll()
        time.sleep(POLL)
        for shard in [shard for shard in missing if shards.holds(shard)]:
            missing.remove(shard)
            since = time.monotonic()
            progress.made(shard)
    if missing:
        text = f"no shard from the other processes for {patience:.0f} s: {counted(len(missing), 'shard')} made here"
        progress.log("warning", text=text)


class _Worker:
    """A process of Ray that makes shards. What is wrong with the call goes back as text: not every exception can be sent."""

    def __init__(self, plan: Plan, folder: Path, directory: str):
        with suppress(OSError):  # paths that were given are relative to where the command was called
            os.chdir(directory)
        self._shards, self._maker = Shards(plan, folder), None

    def make(self, shard: Shard) -> tuple[Shard, str | None]:
        try:
            self._maker = self._maker or Maker.of(self._shards.plan)
            self._shards.make(self._maker, shard)
        except CairnError as error:
            return shard, str(error)
        return shard, None


def _made_by_workers(
    shards: Shards, missing: Sequence[Shard], workers: int, address: str | None, progress: _Progress
) -> Iterator[Shard]:
    """Each shard when it is there. Ray begins a worker again that dies, and what it was at. Without an address, Ray is started
    on this machine and stopped at the end; accelerators are shared out evenly."""
    with closing(Cluster(address, cpus=workers, instead=INSTEAD)) as cluster:
        ray = cluster.ready()
        from ray.util import ActorPool

        devices = ray.cluster_resources().get("GPU", 0) if shards.plan.config.device != "cpu" else 0
        share = 1 / ceil(workers / devices) if devices else 0  # as many as fit: a third of a device each, never 0.75
        retried = {"max_restarts": LOSSES - 1, "max_task_retries": LOSSES - 1}
        kind = ray.remote(num_cpus=1, num_gpus=share, **retried)(_Worker)
        folder = shards.folder.resolve()
        actors = [kind.remote(shards.plan, folder, os.getcwd()) for _ in range(min(workers, len(missing)))]
        pool = ActorPool(actors)
        for shard in missing:
            pool.submit(lambda actor, own: actor.make.remote(own), shard)
        try:
            while pool.has_next():
                progress.checkpoint.poll()
                try:
                    shard, problem = pool.get_next_unordered(timeout=POLL)
                except TimeoutError:
                    continue
                if problem is not None:
                    raise CairnError(problem)
                yield shard
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise ResultError(
                f"a worker died {LOSSES} times ({first_line(error)}); if memory was short, give less than --workers {workers}; "
                f"{GOES_ON}"
            ) from None
        finally:
            for actor in actors:
                ray.kill(actor)
