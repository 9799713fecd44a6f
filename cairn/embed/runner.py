"""A features file from beginning to end: alone, by Ray's workers, or by processes that torchrun started."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from cairn.embed.plan import SPLITS, EmbedConfig, MadeAs, Plan, Shard, difference
from cairn.embed.shards import Maker, Shards, planned
from cairn.errors import GOES_ON, CairnError, ConfigError, DataError, ResultError, counted, first_line
from cairn.experiment.folder import Lock
from cairn.storage.files import make_folder
from cairn.storage.tensors import TensorFile
from cairn.training.checkpoint import Checkpoint
from cairn.training.distributed import ALONE, World
from cairn.training.log import Log
from cairn.training.ray_cluster import Cluster, ray_module

INSTEAD = "torchrun"
"""What makes a file with several processes where there is no Ray."""

LOSSES = 3
"""Times that a worker of Ray may die."""

POLL = 0.2
"""Seconds between two looks for a signal while Ray works."""


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
    world: World = ALONE,
    keep_parts: bool = False,
    overwrite: bool = False,
    log: Log | None = None,
    checkpoint: Checkpoint | None = None,
) -> Embedded:
    """The features file `out` of a data set's images, which `features_dataset` reads.

    What a call that was cut off has made is not made again. `workers` above 1 are Ray's, at `address` or on this machine; or
    else the processes of `world` share the shards, and the main one writes the file. Between passes `checkpoint` may stop it.
    Raises a CairnError for any bad input before anything is written, and ResultError where `out` holds, or was begun with,
    something else, unless `overwrite`.
    """
    log, checkpoint = (log or Log()) if world.is_main else Log(), checkpoint or Checkpoint()
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: must end in .safetensors, by which `cairn run --data` knows it")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if workers > 1:
        if world.world_size > 1:
            raise ConfigError(
                f"--workers {workers}: {counted(world.world_size, 'process')} started already; leave --workers out"
            )
        ray_module(INSTEAD)
    if not overwrite and (done := _finished(config, out)) is not None:
        return done
    if out.is_dir():
        raise ResultError(f"'{out}': a folder; give the path of a file")
    began = time.perf_counter()
    with ExitStack() as held:
        with world.connected(config.device):
            maker, notices = planned(config, world.device)
            plan, shards = maker.plan, Shards(maker.plan, out.with_name(f"{out.name}.parts"))
            if len(set(world.all_gather(plan.key))) > 1:
                raise DataError(
                    f"data '{config.data}': its images or the towers differ between processes; give all the same"
                )
            if not overwrite:
                shards.require_same_plan(log)
            if world.is_main:
                held.enter_context(_locked(shards))
            missing = world.broadcast_from_main(shards.begin)
            for text in notices:
                log("notice", text=text)
            log(
                "begin",
                data=config.data,
                towers=plan.towers.name,
                train=plan.train,
                test=plan.test,
                dim=plan.dim,
                shards=len(plan.shards),
                there=len(plan.shards) - len(missing),
            )
            _warn_of_full_disk(shards, missing, log)
            progress = _Progress(plan, missing, log, checkpoint)
            if workers > 1 and missing:
                _made_by_workers(shards, missing, workers, address, progress)
            else:
                _make(shards, maker, missing, world, progress)
        size = 0
        if world.is_main:  # the others need not wait for it
            size = shards.merge(maker, out)
            if not keep_parts:
                shards.clear()
    made, seconds = sum(shard.rows for shard in missing), time.perf_counter() - began
    return Embedded(out, plan.train + plan.test, plan.dim, made, seconds, size)


def _finished(config: EmbedConfig, out: Path) -> Embedded | None:
    """What is there already. Raises ResultError if another call made it."""
    if not os.path.lexists(out):
        return None
    try:
        header = TensorFile(out).header
        differs = difference(config, MadeAs.parsed(header.metadata).config)
        (train, dim), (test, _) = (header.tensors[f"{split}_features"][0].shape for split in SPLITS)
    except (CairnError, OSError, ValueError, KeyError, RecursionError):
        raise ResultError(f"'{out}': not made by this command; give another --out or --overwrite") from None
    if differs:
        raise ResultError(f"'{out}': made with {differs}; give another --out or --overwrite")
    return Embedded(out, train + test, dim, 0, 0.0, out.stat().st_size, finished=True)


@contextmanager
def _locked(shards: Shards) -> Iterator[None]:
    """The folder, for one call at a time. Where it fails before there is a shard, nothing is left."""
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
        self.log, self.checkpoint, self._images = log, checkpoint, plan.train + plan.test
        self._before = self._done = self._images - sum(shard.rows for shard in missing)
        self._began, self._under_way = time.perf_counter(), 0

    def passed(self, rows: int) -> None:
        """Rows of the shard that is being made. Raises Interrupted if it was asked to stop."""
        self._under_way += rows
        done = self._done + self._under_way
        rate = (done - self._before) / max(time.perf_counter() - self._began, 1e-9)
        remaining = (self._images - done) / rate if rate > 0 else float("inf")
        self.log.progress(done=done, images=self._images, rate=rate, remaining=remaining)
        self.checkpoint.poll()

    def made(self, shard: Shard) -> None:
        """A shard that is there now."""
        self._done += shard.rows
        self._under_way = 0
        self.passed(0)


def _make(shards: Shards, maker: Maker, missing: Sequence[Shard], world: World, progress: _Progress) -> None:
    """One shard for each process, then they meet, then the next: all know what is there, and notice if one is lost."""
    for start in range(0, len(missing), world.world_size):
        together = missing[start : start + world.world_size]
        if world.rank < len(together):
            shards.make(maker, together[world.rank], progress.passed)
        world.all_gather(None)
        for shard in together:
            progress.made(shard)


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
) -> None:
    """Ray begins a worker again that dies, and what it was at. Without an address, Ray is started
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
                progress.made(shard)
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
