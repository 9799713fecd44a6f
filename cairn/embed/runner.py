"""A features file from beginning to end: alone, by Ray's workers, or by processes that torchrun started."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from cairn.embed.plan import PLAN, SPLITS, EmbedConfig, MadeAs, Plan, Shard, difference, stored_plan
from cairn.embed.shards import Embedding, planned
from cairn.errors import GOES_ON, CairnError, ConfigError, DataError, ResultError, counted, first_line
from cairn.experiment.folder import locked
from cairn.storage.files import write_json
from cairn.storage.tensors import TensorFile
from cairn.storage.versions import changes
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
    out: str | os.PathLike[str],
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
    out = Path(out)
    _require_possible(out, workers, world)
    if not overwrite and (done := _finished(config, out)) is not None:
        return done
    if out.is_dir():
        raise ResultError(f"'{out}': a folder; give the path of a file")
    began = time.perf_counter()
    with ExitStack() as held:
        with world.connected(config.device):
            work, notices = planned(config, parts_folder(out), world.device)
            plan = work.plan
            if len(set(world.all_gather(plan.key))) > 1:
                raise DataError(
                    f"data '{config.data}': its images or the towers differ between processes; give all the same"
                )
            if not overwrite:
                _require_same_plan(work, log)
            if world.is_main:
                held.enter_context(locked(work.folder))
                held.callback(_clear_nothing_made, work)
            missing = world.broadcast_from_main(lambda: _begun(work))
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
            _warn_of_full_disk(work, missing, log)
            progress = _Progress(plan, missing, log, checkpoint)
            if workers > 1 and missing:
                made = _made_by_workers(work, missing, workers, address, checkpoint)
            else:
                made = _made_by_processes(work, missing, world, progress.passed)
            for shard in made:
                progress.made(shard)
        size = 0
        if world.is_main:  # the others need not wait for it
            size = work.merge(out)
            if not keep_parts:
                work.clear()
    number, seconds = sum(shard.rows for shard in missing), time.perf_counter() - began
    return Embedded(out, plan.train + plan.test, plan.dim, number, seconds, size)


def parts_folder(out: Path) -> Path:
    """Where the shards of a features file lie until it is whole."""
    return out.with_name(f"{out.name}.parts")


def _require_possible(out: Path, workers: int, world: World) -> None:
    """Raises ConfigError for a call that names no features file, or asks for workers that cannot be had."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: must end in .safetensors, by which `cairn run --data` knows it")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if workers > 1:
        if world.world_size > 1:
            started = counted(world.world_size, "process")
            raise ConfigError(f"--workers {workers}: {started} started already; leave --workers out")
        ray_module(INSTEAD)


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


def _require_same_plan(work: Embedding, log: Log) -> None:
    """Raises ResultError where the folder was begun with another plan."""
    plan, stored = work.plan, stored_plan(work.folder)
    if stored is None:
        return
    if stored.key != plan.key:
        differs = plan.difference(stored)
        raise ResultError(f"'{work.folder}': begun with {differs}; give another --out, or --overwrite to begin again")
    if changed := changes(stored.versions):
        text = f"versions changed since the shards were begun ({changed}): rows may differ in last bits"
        log("warning", text=text)


def _begun(work: Embedding) -> list[Shard]:
    """Keeps the plan; the shards that are missing."""
    write_json(work.folder / PLAN, work.plan.model_dump(mode="json"))
    return [shard for shard in work.plan.shards if work.read(shard) is None]


def _clear_nothing_made(work: Embedding) -> None:
    """Where it ends before there is a shard, nothing is left."""
    if not work.present():
        work.clear()


def _warn_of_full_disk(work: Embedding, missing: Sequence[Shard], log: Log) -> None:
    """A warning alone: what a disk tells of itself may be wrong."""
    plan = work.plan
    needed = plan.dim * plan.dtype.itemsize * (sum(shard.rows for shard in missing) + plan.train + plan.test)
    free = shutil.disk_usage(work.folder).free
    if free < needed:
        log("warning", text=f"'{work.folder}': shards and file take {needed:,} bytes, {free:,} are free")


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


def _made_by_processes(
    work: Embedding, missing: Sequence[Shard], world: World, passed: Callable[[int], Any]
) -> Iterator[Shard]:
    """One shard for each process, then they meet, then the next: all know what is there, and notice if one is lost."""
    for start in range(0, len(missing), world.world_size):
        together = missing[start : start + world.world_size]
        if world.rank < len(together):
            work.make(together[world.rank], passed)
        world.all_gather(None)
        yield from together


class _Worker:
    """A process of Ray that makes shards. What is wrong with the call goes back as text: not every exception can be sent."""

    def __init__(self, plan: Plan, folder: Path, directory: str):
        with suppress(OSError):  # paths that were given are relative to where the command was called
            os.chdir(directory)
        self._plan, self._folder, self._work = plan, folder, None

    def make(self, shard: Shard) -> tuple[Shard, str | None]:
        try:
            self._work = self._work or Embedding.of(self._plan, self._folder)
            self._work.make(shard)
        except CairnError as error:
            return shard, str(error)
        return shard, None


def _made_by_workers(
    work: Embedding, missing: Sequence[Shard], workers: int, address: str | None, checkpoint: Checkpoint
) -> Iterator[Shard]:
    """Ray begins a worker again that dies, and what it was at. Without an address, Ray is started
    on this machine and stopped at the end; accelerators are shared out evenly."""
    with closing(Cluster(address, cpus=workers, instead=INSTEAD)) as cluster:
        ray = cluster.ready()
        from ray.util import ActorPool

        devices = ray.cluster_resources().get("GPU", 0) if work.plan.config.device != "cpu" else 0
        share = 1 / ceil(workers / devices) if devices else 0  # as many as fit: a third of a device each, never 0.75
        retried = {"max_restarts": LOSSES - 1, "max_task_retries": LOSSES - 1}
        kind = ray.remote(num_cpus=1, num_gpus=share, **retried)(_Worker)
        folder = work.folder.resolve()
        actors = [kind.remote(work.plan, folder, os.getcwd()) for _ in range(min(workers, len(missing)))]
        pool = ActorPool(actors)
        for shard in missing:
            pool.submit(lambda actor, own: actor.make.remote(own), shard)
        try:
            while pool.has_next():
                checkpoint.poll()
                with suppress(TimeoutError):
                    shard, problem = pool.get_next_unordered(timeout=POLL)
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
