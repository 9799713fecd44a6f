"""Every stored result and the call that makes it; what is there already is left as it is.

    python scripts/results.py [--only PART] [--jobs 2] [--list]

Sets other than the drawn world are looked for under `data/` (a link will do): `cifar100` (photographs in folders),
`mini-clip` (a small CLIP in the transformers layout), `clip-vit-b32-features/*.safetensors`. Those that are missing are
skipped, and said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ["--data", "data/cifar100", "--towers", "data/mini-clip", "--step", "10"]
EMBEDDINGS = ["--step", "10", "--order", "seed:1993", "--data"]
STREAMS = {
    "shapes": ["--data", "shapes"],
    "caltech51": [*EMBEDDINGS, "data/clip-vit-b32-features/caltech51.safetensors"],
    "ucf101": [*EMBEDDINGS, "data/clip-vit-b32-features/ucf101.safetensors"],
    "cifar100-50": [*PHOTOGRAPHS, "--limit-train", "50"],
    "cifar100": [*PHOTOGRAPHS, "--order", "seed:1993"],
    "spa-shapes": ["--data", "shapes"],
    "spa-cifar100": [*PHOTOGRAPHS, "--order", "seed:1993"],
}
THREE, FIVE = "1,2,3", "1,2,3,4,5"

SPA_SWITCHES = {
    "spa": [],
    "no-patches": ["local.weight=0"],
    "no-selection": ["local.patches=null"],
    "no-transport": ["local.transport=false"],
    "no-projectors": ["schedule.epochs=0"],
    "no-replay": ["replay=0"],
    "native": ["local.attention=native"],
    "words": ["local.tokens=words"],
    "templates": ["descriptions=template"],
    "patches-8": ["local.patches=8"],
    "best-1": ["local.best=1"],
    "plan": ["local.score=plan"],
    "label-guide": ["local.training_guide=label"],
}
DESCRIBED = ["descriptions=examples/cifar100-descriptions.json"]
"""The photographs bring no descriptions of their own."""

Job = tuple[str, str, str, list[str], str]
"""Stream, folder, method, settings, seeds."""


def jobs() -> list[Job]:
    found: list[Job] = []
    for stream in ("shapes", "caltech51", "cifar100-50", "cifar100"):
        for method in ("zero-shot", "simplecil", "finetune", "joint", "dmc", "dmc-ot", "spa"):
            said = DESCRIBED if method == "spa" and stream.startswith("cifar100") else []
            if stream == "cifar100-50" and method in ("dmc-ot", "spa"):
                continue
            found.append((stream, method, method, said, FIVE if stream == "shapes" and "dmc" in method else THREE))
    found.append(("ucf101", "simplecil", "simplecil", [], "1"))
    moving, residual = "stage1.schedule.lr=1e-3", "stage2.text=residual"
    found += [
        ("cifar100", "dmc-moving", "dmc", [moving], THREE),
        ("cifar100", "dmc-frozen", "dmc", ["stage1.tuning=none"], THREE),
        ("cifar100", "dmc-ot-residual", "dmc-ot", [residual], THREE),
        ("cifar100", "dmc-ot-moving", "dmc-ot", [residual, moving], THREE),
    ]
    for name, switches in SPA_SWITCHES.items():
        found.append(("spa-shapes", name, "spa", switches, THREE))
        if name != "templates":
            found.append(("spa-cifar100", name, "spa", [*DESCRIBED, *switches], THREE))
        else:
            found.append(("spa-cifar100", name, "spa", switches, THREE))
    return found


def command(job: Job) -> list[str]:
    stream, folder, method, settings, seeds = job
    flags = [part for setting in settings for part in ("--set", setting)]
    out = ["--out", f"results/{stream}/{folder}", "--seeds", seeds]
    return ["cairn", "run", method, *STREAMS[stream], *flags, *out]


def missing(job: Job) -> bool:
    return any(part.startswith("data/") and not (ROOT / part).exists() for part in STREAMS[job[0]])


def run(job: Job) -> int:
    words = command(job)
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [Path(sys.executable).with_name("cairn"), *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True
    )
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    print(f"{'ok' if done.returncode == 0 else 'FAILED'}  {' '.join(words)}\n    {last[-1] if last else ''}", flush=True)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="stream, or stream/folder")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--list", action="store_true", help="print the calls alone")
    args = parser.parse_args()
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
            sys.exit(max(pool.map(run, [job for job in wanted if not missing(job)]), default=0))


if __name__ == "__main__":
    main()
