"""Results on disk: whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cairn.data.catalogue import open_dataset
from cairn.errors import ResultError
from cairn.evaluation.metrics import mean_and_deviation
from cairn.methods.catalogue import method_named
from cairn.methods.protocol import Method
from cairn.run import SCHEMA_VERSION, RunConfig, RunResult, towers_for
from cairn.towers.catalogue import load_towers
from cairn.training.log import Log

RESULT, EVENTS, SUMMARY, LEARNER = "result.json", "events.jsonl", "summary.json", "learner.safetensors"
SUMMARISED = ("average", "last", "forgetting", "bwt", "seconds")


def make_folder(path: Path) -> None:
    """Raises ResultError if the folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"'{path}': cannot be written: {error.strerror}; give another --out") from None


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary file beside it, flush to the disk, rename: a reader sees the old file or the new one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ResultError(f"'{path.parent}': cannot be written: {error.strerror}; give another --out") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ResultError(
            f"'{path}': cannot be written: {error.strerror}; free some space or give another --out"
        ) from None


def read_result(path: Path) -> RunResult:
    """A result from its file or its folder. Raises ResultError for what is missing, damaged or of a newer version."""
    file = path / RESULT if path.is_dir() else path
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"'{file}': cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"'{file}': not JSON: {error}") from None
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultError(
            f"'{file}': schema_version {version}, this cairn reads {SCHEMA_VERSION}; use the version that wrote it"
        )
    try:
        return RunResult.model_validate(stored)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ResultError(f"'{file}': {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from None


class RunFolder:
    """Where one run writes: `events.jsonl` as it goes, `result.json` when it is done."""

    def __init__(self, path: Path, config: RunConfig):
        self.path, self.config = path, config
        self._events: TextIO | None = None

    def finished(self) -> RunResult | None:
        """The result that is already there, if the same call made it. Raises ResultError if another call did."""
        if not (self.path / RESULT).exists():
            return None
        stored = read_result(self.path)
        if stored.run != self.config:
            ours, theirs = self.config.model_dump(), stored.run.model_dump()
            key = next(key for key in ours if ours[key] != theirs[key])
            raise ResultError(
                f"'{self.path}' holds another run ({key} {theirs[key]}, not {ours[key]}); give another --out or --overwrite"
            )
        return stored

    @property
    def closed(self) -> bool:
        return self._events is None

    def open(self) -> None:
        """Make the folder, with an empty event log. Raises ResultError if it cannot be written."""
        make_folder(self.path)
        try:
            (self.path / RESULT).unlink(missing_ok=True)
            self._events = open(self.path / EVENTS, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise ResultError(f"'{self.path}': cannot be written: {error.strerror}; give another --out") from None

    def keep(self, event: dict[str, Any]) -> None:
        self._events.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._events.flush()

    def write(self, result: RunResult) -> None:
        write_json(self.path / RESULT, result.model_dump(mode="json"))

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def write_learner(path: Path, method: Method) -> None:
    """What a method has learned, as safetensors; whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in method.state_dict().items()}, temporary
        )
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResultError(f"'{path}': cannot be written: {error}; free some space or give another --out") from None


def read_learner(folder: Path) -> tuple[RunResult, Method]:
    """A run's result and its method as it was after the last task, ready to score images.

    Raises ResultError where the run kept no learner, the file is damaged, or today's towers are not those of the run.
    """
    result, file = read_result(folder), folder / LEARNER
    if not file.is_file():
        raise ResultError(f"'{folder}': the run kept no learner; run it again with --keep-learner")
    run = result.run
    if run.data.endswith(".safetensors"):
        towers = towers_for(run, open_dataset(run.data))
    else:
        spec = "tiny" if run.towers == "auto" else run.towers
        towers = load_towers(
            spec, device="auto", precision=run.precision, preprocess=run.preprocess, revision=run.revision
        )
    if towers.fingerprint != result.towers.fingerprint:
        raise ResultError(
            f"'{folder}': learned on towers {result.towers.fingerprint}, '{towers.name}' is {towers.fingerprint} today"
        )
    entry = method_named(result.method)
    method = entry.build(towers, entry.config.model_validate(result.config), seed=run.seed, log=Log())
    try:
        # Cloned into aligned memory: a product's last bits depend on where a tensor begins
        method.load_state_dict({key: value.clone() for key, value in load_file(file).items()})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ResultError(f"'{file}': cannot be read: {str(error).splitlines()[0]}; run again") from None
    return result, method


def summary(results: Sequence[RunResult]) -> dict[str, Any]:
    """Mean and sample standard deviation over runs that differ in their seed alone."""
    first = results[0]
    figures = {}
    for key in SUMMARISED:
        values = [getattr(result, key) for result in results]
        if None not in values:
            mean, deviation = mean_and_deviation(values)
            figures[key] = {"mean": mean, "deviation": deviation, "values": values}
    rows = list(zip(*(result.seen_accuracy for result in results), strict=True))
    return {
        "schema_version": SCHEMA_VERSION, "method": first.method, "data": first.data, "split": first.split,
        "towers": first.towers.model_dump(), "run": first.run.model_dump(mode="json"),
        "seeds": [result.seed for result in results], **figures,
        "seen_accuracy": [mean_and_deviation(values)[0] for values in rows],
    }  # fmt: skip
