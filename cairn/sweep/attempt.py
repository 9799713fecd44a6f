"""One attempt at a run of a sweep: in its folder, with nothing to show but the folder's events."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from cairn.data.feature_store import FeatureStore
from cairn.errors import CairnError, Interrupted, ResultError, one_line
from cairn.experiment.folder import Call, Lock, RunFolder
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunResult
from cairn.storage.files import make_folder
from cairn.sweep.order import Ended, Order
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log

PATIENCE = 60.0
"""Seconds to wait for a folder that is being written. A worker that was given up may take a moment to die."""

FIGURES = ("average", "last", "forgetting", "bwt", "seconds", "memory_bytes", "resumed")


def figures(result: RunResult) -> dict[str, Any]:
    """What a sweep tells of a result."""
    return {key: getattr(result, key) for key in FIGURES}


def attempted(order: Order, checkpoint: Checkpoint) -> Ended:
    """Take the run up where it is, and end it; whatever goes wrong in it is told, not raised."""
    call = Call.model_validate(order.call)
    folder = TakenFolder(Path(order.folder), call)
    try:
        with folder.taken(checkpoint):
            done = folder.finished()
            return Ended(order.name, "finished", figures=figures(done or _run(folder, order, checkpoint)))
    except Interrupted:
        return Ended(order.name, "stopped")
    except CairnError as error:
        return Ended(order.name, "failed", str(error))
    except Exception as error:  # a fault of the method's code ends this run and no other
        reason = one_line(str(error))[:500]
        return Ended(order.name, "failed", f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


def _run(folder: TakenFolder, order: Order, checkpoint: Checkpoint) -> RunResult:
    folder.open()
    place = {"host": socket.gethostname(), "process": os.getpid()}
    folder.keep({"event": "attempt", "number": order.number, "token": order.token, **place})
    store = FeatureStore.configured() if folder.call.cache else None
    try:
        result = run_stream(
            folder.call.run, Log(keep=folder.keep), store=store, checkpoint=checkpoint, archive=folder.archive
        )
        folder.write(result)
    except Interrupted:
        raise
    except Exception as error:
        folder.keep({"event": "error", "text": str(error), "traceback": traceback.format_exc()})
        raise
    return result


class TakenFolder(RunFolder):
    """A run folder that is locked before one looks whether its run is finished: of two attempts the second finds what the
    first has done, and neither begins it again."""

    def __init__(self, path: Path, call: Call):
        super().__init__(path, call)
        self._lock = PatientLock(path)

    @contextmanager
    def taken(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Raises ResultError if another process writes there for PATIENCE seconds, Interrupted if asked to stop meanwhile."""
        make_folder(self.path)
        self._lock.wait(checkpoint)
        try:
            yield
        finally:
            self.close()
            self._lock.release()


class PatientLock(Lock):
    """A lock that can be waited for. To take what is held, or to release what is not, changes nothing."""

    def wait(self, checkpoint: Checkpoint) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self.take()
                return
            except ResultError as error:
                if not isinstance(error.__context__, Timeout) or time.monotonic() > until:
                    raise
            checkpoint.poll()
            time.sleep(0.2)

    def take(self) -> Lock:
        return self if self._lock.is_locked else super().take()

    def release(self) -> None:
        if self._lock.is_locked:
            super().release()
