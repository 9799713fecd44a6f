"""Plants the bugs of `plants.py` one by one in a copy of the package, and tells which of them the tests notice.

    python tests/stress/plant.py [--only WORD] [--jobs 2] [--out FILE.json]

The exit status is 1 where fewer than 95 % are noticed. A test file that fails or takes too long has noticed; one that cannot
be run at all is an error. Test files are first run without a bug. FILE.json is written after each bug, and a run that is started
again with it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from plants import PLANTS, Plant

ROOT = Path(__file__).resolve().parents[2]
LEAST = 0.95
LIMIT = 900
"""Seconds for the test files of one bug."""

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["jaxtyping", "PIL", "pydantic", "pytest", "safetensors", "torch", "transformers"])
"""Imported once, and not by every run: that takes longer than most tests."""


def tried(plant: Plant | None, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass on the package with that bug."""
    with tempfile.TemporaryDirectory(prefix="plant-") as folder:
        copy, said = Path(folder) / "cairn", Path(folder) / "said.txt"
        shutil.copytree(ROOT / "cairn", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if plant is not None:
            file = copy / plant.file
            text = file.read_text(encoding="utf-8")
            if text.count(plant.old) != 1:
                raise SystemExit(f"{plant.name}: '{plant.old}' stands {text.count(plant.old)} times in {plant.file}")
            file.write_text(text.replace(plant.old, plant.new), encoding="utf-8")
        process = PROCESSES.Process(target=_run, args=(folder, tests, said))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            return False
        if process.exitcode not in (0, 1) or (plant is None and process.exitcode):
            raise SystemExit(
                f"{' '.join(tests)}, {plant.name if plant else 'no bug'}: mend that\n{said.read_text()[-2000:]}"
            )
        return process.exitcode == 0


def _run(folder: str, tests: tuple[str, ...], said: Path) -> None:
    """In a process of its own: the tests, with the package in `folder`; what they print goes to the file `said`."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, folder)
    import pytest

    found = find_spec("cairn")  # not imported: the tests' import hook must come first
    if found is None or not Path(found.origin).is_relative_to(folder):
        print(f"{found}: not the copy")
        sys.exit(2)
    sys.exit(
        pytest.main(
            [
                # Plugins that were imported before pytest saw them are no fault of the tests
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
                "-c",
                str(ROOT / "pyproject.toml"),
                "--rootdir",
                str(ROOT),
                *(str(ROOT / "tests" / test) for test in tests),
            ]
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose name or file holds this word")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="a JSON file with what became of each bug; what it has is not tried again"
    )
    given = parser.parse_args()
    chosen = [plant for plant in PLANTS if given.only in plant.name or given.only in plant.file]
    if not chosen:
        parser.error(f"--only {given.only}: no bug of that name")
    rows = json.loads(given.out.read_text())["bugs"] if given.out is not None and given.out.is_file() else []
    planted = {_key(plant._asdict()) for plant in PLANTS}
    rows = [row for row in rows if _key(row) in planted]  # a bug that was changed since is tried again
    found = {_key(row) for row in rows}
    left = sorted(
        (plant for plant in chosen if _key(plant._asdict()) not in found), key=lambda p: (_size(p.tests), p.tests)
    )

    def noticed(plant: Plant) -> tuple[bool, float]:
        start = time.monotonic()
        return not tried(plant, plant.tests), time.monotonic() - start

    print("| bug | where | killed | seconds |\n|---|---|---|---|")
    with ThreadPoolExecutor(given.jobs) as workers:
        for tests, plants in groupby(left, key=lambda plant: plant.tests):
            if not tried(None, tests):
                raise SystemExit(f"{' '.join(tests)}: not done in {LIMIT} seconds without any bug")
            same = list(plants)
            for plant, (killed, seconds) in zip(same, workers.map(noticed, same), strict=True):
                print(f"| {plant.name} | {plant.file} | {'yes' if killed else '**no**'} | {seconds:.0f} |", flush=True)
                rows.append(plant._asdict() | {"killed": killed})
                if given.out is not None:
                    _write(given.out, rows)
    killed = sum(row["killed"] for row in rows)
    print(f"\n{killed} of {len(rows)} killed ({100 * killed / len(rows):.1f} %)")
    return int(killed / len(rows) < LEAST)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(value) if key == "tests" else value for key, value in row.items() if key in Plant._fields)


def _size(tests: tuple[str, ...]) -> int:
    """A guess at how long these take: files are tried in this order, so that a run that is cut off has most bugs behind it."""
    return sum((ROOT / "tests" / test).stat().st_size for test in tests)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """In one move, so that a run that is cut off leaves a whole file."""
    text = json.dumps({"planted": len(rows), "killed": sum(row["killed"] for row in rows), "bugs": rows}, indent=1)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
