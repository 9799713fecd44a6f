"""Plants the bugs of `plants.py` one by one in a copy of the package, and tells which of them the tests notice.

    python tests/stress/plant.py [--only WORD] [--jobs 2] [--out FILE.json]

The exit status is 1 where fewer than 95 % are noticed. A test file that fails or takes too long has noticed; one that cannot
be run at all is an error, told apart by a run without a bug.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plants import PLANTS, Plant

ROOT = Path(__file__).resolve().parents[2]
LEAST = 0.95
LIMIT = 900
"""Seconds for the test files of one bug."""


def tried(plant: Plant | None, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass on the package with that bug."""
    with tempfile.TemporaryDirectory(prefix="plant-") as folder:
        copy = Path(folder) / "cairn"
        shutil.copytree(ROOT / "cairn", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if plant is not None:
            file = copy / plant.file
            text = file.read_text(encoding="utf-8")
            if text.count(plant.old) != 1:
                raise SystemExit(f"{plant.name}: '{plant.old}' stands {text.count(plant.old)} times in {plant.file}")
            file.write_text(text.replace(plant.old, plant.new), encoding="utf-8")
        command = [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
            "--rootdir", str(ROOT), *(str(ROOT / "tests" / test) for test in tests),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            # In the copy's folder, for what Python finds first is where it stands
            found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return False
        if found.returncode not in (0, 1):
            raise SystemExit(
                f"{plant and plant.name}: the tests could not be run\n{found.stdout[-2000:]}{found.stderr[-500:]}"
            )
        return found.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose name or file holds this word")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file with what became of each bug")
    given = parser.parse_args()
    chosen = [plant for plant in PLANTS if given.only in plant.name or given.only in plant.file]
    if not chosen:
        parser.error(f"--only {given.only}: no bug of that name")
    files = tuple(dict.fromkeys(test for plant in chosen for test in plant.tests))
    if not tried(None, files):
        raise SystemExit("the tests fail without any bug: mend that first")

    def noticed(plant: Plant) -> tuple[bool, float]:
        start = time.monotonic()
        return not tried(plant, plant.tests), time.monotonic() - start

    rows = []
    print("| bug | where | killed | seconds |\n|---|---|---|---|")
    with ThreadPoolExecutor(given.jobs) as workers:
        for plant, (killed, seconds) in zip(chosen, workers.map(noticed, chosen), strict=True):
            print(f"| {plant.name} | {plant.file} | {'yes' if killed else '**no**'} | {seconds:.0f} |", flush=True)
            rows.append({"name": plant.name, "file": plant.file, "tests": plant.tests, "killed": killed})
    share = sum(row["killed"] for row in rows) / len(rows)
    print(f"\n{sum(row['killed'] for row in rows)} of {len(rows)} killed ({100 * share:.1f} %)")
    if given.out is not None:
        given.out.write_text(json.dumps({"planted": len(rows), "share": share, "bugs": rows}, indent=1) + "\n")
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
