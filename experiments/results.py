"""Every stored result and the call that makes it; what is there already is left as it is.

    python experiments/results.py [--only STREAM[/FOLDER]] [--jobs 2] [--list]
    python experiments/results.py --tables      # only write the documents' tables anew from what is stored

Sets other than the drawn world are looked for under `data/` (a link will do): `cifar100` (photographs in folders),
`mini-clip` (a small CLIP in the transformers layout), `clip-vit-b32-features/*.safetensors`. Those that are missing are
skipped, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rows import COMPARISONS, DRIFT, TABLES, Job, jobs
from streams import FEW_IMAGES, ROOT, STREAMS

from cairn.config import values_by_path
from cairn.storage.files import read_json


def where(job: Job) -> list[str]:
    return DRIFT[job[1]][0] if job[2] == "drift" else STREAMS[job[0]]


def command(job: Job) -> list[str]:
    stream, folder, method, settings, seeds = job
    flags = [part for setting in settings for part in words_of(setting)]
    out = ["--out", f"results/{stream}/{folder}", "--seeds", seeds]
    return ["cairn", *(["drift"] if method == "drift" else ["run", method]), *where(job), *flags, *out]


def words_of(setting: str) -> list[str]:
    """Of a call: a setting of the method, or an option that is written out."""
    return setting.split() if setting.startswith("--") else ["--set", setting]


def missing(job: Job) -> bool:
    return any(part.startswith("data/") and not (ROOT / part).exists() for part in where(job))


def done(job: Job) -> bool:
    """All seeds are stored, made with these settings; a run itself would say so, but takes seconds to start."""
    stream, folder, method, settings, seeds = job
    place = ROOT / "results" / stream / folder
    if method == "drift":
        return (place / "drift.json").exists()
    if not (place / "summary.json").exists():
        return False
    stored = read_json(place / "summary.json")
    own = [setting for setting in settings if not setting.startswith("--")]
    same = values_by_path(stored["run"]["settings"]) == values_by_path(own)
    return same and stored["method"] == method and stored["seeds"] == [int(seed) for seed in seeds.split(",")]


def folders(name: str) -> list[str]:
    """The folders of results behind a block: `a`, `a:b` of a comparison, or `a/{b,c}`."""
    head, _, parts = name.partition("{")
    halves = [f"{head}{part}" for part in parts.rstrip("}").split(",")] if parts else name.split(":")
    return [f"results/{half}" for half in halves]


def write_tables() -> None:
    """Every block whose results are there, and the laboratory's figures."""
    from cairn.reports.drift import drift_figure

    for command, pages in (("table", TABLES), ("compare", COMPARISONS)):
        for page, names in pages.items():
            for name in names:
                if all((ROOT / folder).is_dir() for folder in folders(name)):
                    cairn(command, *folders(name), "--into", page, "--name", name)
    for report in sorted((ROOT / "results" / "drift").rglob("drift.json")):
        drift_figure(json.loads(report.read_text(encoding="utf-8")), report.with_name("drift.png"))
    for name in ("methods", "ranking", "costs", "scale"):
        cairn_script(f"{name}.py")
    for name in OTHERS:
        cairn_script(f"{name}.py", "--table")
    cairn_script("calibration.py", "--table", "--forms")
    cairn_script("patches_on_object.py", "--out", "results/patches.json", "--into", "docs/measured.md")
    cairn_script("../benchmarks/run.py", "--table", "--out", "results/benchmarks", "--into", "docs")


OTHERS = (
    "foreign",
    "heads",
    "aper",
    "auto",
    "calibration",
    "known",
    "month",
    "orders",
    "refinement",
    "rehearsal",
    "unequal",
    "unknown",
)
"""Measured and stored by a command of this folder each, which `--table` keeps from measuring anew."""


def cairn(*words: str) -> None:
    subprocess.run([Path(sys.executable).with_name("cairn"), *words], cwd=ROOT, check=True)


def cairn_script(name: str, *words: str) -> None:
    subprocess.run(
        [sys.executable, ROOT / "experiments" / name, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )


def run(job: Job, cache: bool) -> int:
    words = [*command(job), *(["--cache"] if cache and job[2] != "drift" else [])]
    if done(job):
        return 0
    if FEW_IMAGES in words and not (ROOT / FEW_IMAGES).exists():
        (ROOT / "build").mkdir(exist_ok=True)
        cairn_script("few_images.py", FEW_IMAGES)
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ended = subprocess.run(
        [Path(sys.executable).with_name("cairn"), *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True
    )
    last = (ended.stdout if ended.returncode == 0 else ended.stderr).strip().splitlines()
    print(
        f"{'ok' if ended.returncode == 0 else 'FAILED'}  {' '.join(words)}\n    {last[-1] if last else ''}", flush=True
    )
    return ended.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/folder")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--cache", action="store_true", help="frozen towers keep their embeddings between runs")
    parser.add_argument("--list", action="store_true", help="print the calls alone")
    parser.add_argument("--tables", action="store_true", help="write the documents' tables from what is stored")
    args = parser.parse_args()
    if args.tables:
        return write_tables()
    wanted = [job for job in jobs() if args.only in (None, job[0], f"{job[0]}/{job[1]}")]
    if not wanted:
        parser.error(f"--only {args.only}: no such stream or folder")
    for job in wanted:
        if args.list:
            print(" ".join(command(job)))
        elif missing(job):
            print(f"skipped, no data: {' '.join(command(job))}")
    if not args.list:
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = max(
                pool.map(lambda job: run(job, args.cache), [job for job in wanted if not missing(job)]), default=0
            )
        if failed:
            sys.exit(failed)
        if args.only is None:
            write_tables()


if __name__ == "__main__":
    main()
