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

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ["--data", "data/cifar100", "--towers", "data/mini-clip", "--step", "10"]
ONE_PASS = ["--stream", "online", "--chunk", "25"]
EIGHTH = ["--labelled", "0.125"]
EMBEDDINGS = ["--step", "10", "--order", "seed:1993", "--data"]
STREAMS = {
    "shapes": ["--data", "shapes"],
    "caltech51": [*EMBEDDINGS, "data/clip-vit-b32-features/caltech51.safetensors"],
    "ucf101": [*EMBEDDINGS, "data/clip-vit-b32-features/ucf101.safetensors"],
    "imagenet150": [*EMBEDDINGS, "data/clip-vit-b32-features/imagenet150.safetensors"],
    **{
        f"caltech51-{n}": [
            *EMBEDDINGS,
            "data/clip-vit-b32-features/caltech51.safetensors",
            "--limit-train",
            str(n),
        ]
        for n in (1, 2, 4, 8)
    },
    "ucf101-at-once": [
        "--step",
        "101",
        "--order",
        "seed:1993",
        "--data",
        "data/clip-vit-b32-features/ucf101.safetensors",
    ],
    "cifar100-50": [*PHOTOGRAPHS, "--limit-train", "50"],
    "cifar100": [*PHOTOGRAPHS, "--order", "seed:1993"],
    "attributes": ["--data", "attributes"],
    **{
        f"{name}-online": [
            *EMBEDDINGS,
            f"data/clip-vit-b32-features/{name}.safetensors",
            "--stream",
            "online",
            "--chunk",
            "20",
        ]
        for name in ("caltech51", "ucf101")
    },
    "shapes-online": ["--data", "shapes", *ONE_PASS, "--limit-train", "10", "--limit-test", "5"],
    "cifar100-online": [*PHOTOGRAPHS, "--order", "seed:1993", *ONE_PASS, "--limit-train", "5", "--limit-test", "5"],
    "shapes-eighth": ["--data", "shapes", "--limit-train", "40", *EIGHTH],
    "cifar100-eighth": [*PHOTOGRAPHS, "--order", "seed:1993", "--limit-train", "40", *EIGHTH],
    "fm-lora-shapes": ["--data", "shapes"],
    "fm-lora-cifar100": [*PHOTOGRAPHS, "--order", "seed:1993"],
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

VALIDATED = [*PHOTOGRAPHS, "--order", "seed:1993", "--validation", "0.2"]
RESIDUAL, MOVING = "stage2.text=residual", "stage1.schedule.lr=1e-3"
FEW_IMAGES = "build/few-images.safetensors"
"""A features file of CUB's size, made by `experiments/few_images.py` when it is needed."""

FEWER = ["--estimators", "bures,paired,local"]
DRIFT = {
    "shapes-dev": (["--data", "shapes:dev"], [RESIDUAL]),
    "shapes-dev-probes": (["--data", "shapes:dev", *FEWER], [RESIDUAL, "probes=1"]),
    "cifar100": (VALIDATED, [RESIDUAL]),
    "cifar100-moving": (VALIDATED, [RESIDUAL, MOVING]),
    "caltech51": (STREAMS["caltech51"], []),
    "ucf101": (STREAMS["ucf101"], []),
    "few-images": (["--data", FEW_IMAGES, "--step", "20"], []),
}
"""Laboratory folders: stream and settings. What chooses defaults never sees the test split of a reported run."""

CALFUSE_PARTS = {
    "calfuse-no-calibration": ["calibration.share=0"],
    "calfuse-no-fusion": ["fusion=none"],
    "calfuse-adapter": ["calibration.share=0", "fusion=none"],
    "calfuse-learned": ["calibration=learned"],
    "calfuse-svd": ["fusion=svd"],
    "calfuse-distilled": ["distillation=1"],
    "calfuse-fast": ["schedule.lr=1e-3"],
    "calfuse-adapter-fast": ["calibration.share=0", "fusion=none", "schedule.lr=1e-3"],
}
"""CalFuse without one of its parts, the same adapter without both, with those that are off, and both of the first at ten times
the rate, where there is more to hold in place."""

RECO_PARTS = {
    "reco-average": ["fusion=average", "compare=image"],
    "reco-both": ["compare=both"],
    "reco-5": ["exemplars=5"],
    "reco-first": ["train=first"],
    "reco-dmc": ["base=dmc"],
}
"""RECO as plain k-nearest-neighbour fusion, as published, with few exemplars, trained once, and around a method."""

CAPNET_PARTS = {
    "capnet-no-graph": ["graph.layers=0"],
    "capnet-cross-entropy": ["loss=cross-entropy"],
    "capnet-plain": ["graph.layers=0", "loss=cross-entropy"],
    "capnet-class-aware": ["sampling=class-aware"],
    "capnet-ensemble": ["ensemble=true"],
}
"""CAPNET without its graph, without its loss, the same prompts with neither, and with several views of a test image."""

FM_LORA_PARTS = {
    "fm-lora-fixed": ["rank=fixed"],
    "fm-lora-energy": ["rank=energy"],
    "fm-lora-no-prompts": ["tuning.prompts=0"],
}
"""FM-LoRA at full rank, with ranks by singular values, and without prompt tokens."""

MCCL_PARTS = {
    "mccl-labelled": ["unlabelled=false"],
    "mccl-consistency": ["statistics=labelled"],
    "mccl-statistics": ["consistency=0", "alignment=0", "compactness=0", "intervention=0"],
}
"""MCCL from labelled images alone, and with the others in its losses alone, or in its statistics alone."""

LORA_8 = [
    "stage1.tuning.rank=8",
    "stage1.tuning.alpha=8",
    r"stage1.tuning.targets=.*vision_model.*\.self_attn\.(k_proj|v_proj)",
    "stage1.classes=current",
    "stage1.schedule.batch=128",
    "stage1.schedule.lr=1e-2",
    "stage1.schedule.weight_decay=0",
]
"""A LoRA of rank 8 on the layers of FM-LoRA, with its loss and schedule."""

SMALL = ["tuning=projection", "replayed=10", "buffer=200"]
REPLAY = [*SMALL, "contrast=0", "classified=both"]
SAMPLED = [*SMALL, "shifts.number=2", "sampled=60", "image_rate=0.5"]
SDA_PARTS = {
    "sda": [*SMALL, "shifts.number=2"],
    "sda-own": [*SMALL, "shifts.number=2", "shifted=own"],
    "sda-replay": [*REPLAY, "steps=5", "schedule.lr=3e-4"],
    "sda-replay-1": REPLAY,
    "sda-replay-40": ["tuning=projection", "buffer=200", "contrast=0", "classified=both", "replayed=40", "steps=2"],
    "sda-sampled": [*SAMPLED, "contrasted=views"],
    "sda-sampled-alone": [*SAMPLED, "contrast=0"],
}
"""SDA at a size that two cores can do, the same with copies that have the label of their class, and plain replay: with as many passes
(90 and 100 for 10 images), and with as many steps. Then both with larger draws, at 100 passes, and such an SDA without its contrast,
at 60.
Learning rates, `image_rate` and the draws were chosen on `shapes:dev`."""

BLEND_PARTS = {
    "blend": [],
    "blend-compact": ["rank=8", "features=512"],
    "blend-one-covariance": ["rank=0"],
    "blend-no-features": ["features=0"],
    "blend-no-text": ["text=false"],
    "blend-gaussians": ["text=false", "features=0"],
    "blend-mean-patch": ["patches=mean"],
    "blend-no-patches": ["patches=none"],
}
"""Blend, and what it is without one of its parts."""

BLEND_STREAMS = ("shapes", "cifar100", "caltech51", "ucf101", "imagenet150", *(f"caltech51-{n}" for n in (1, 2, 4, 8)))


def _counts_on(stream: str, folder: str, switches: list[str]) -> bool:
    """Whether a stream has the part that is left out: embeddings have no patches, and not all of them texts."""
    if "patch" in folder:
        return stream in ("shapes", "cifar100")
    return stream != "ucf101" or "text=false" not in switches


def _blend_blocks() -> list[str]:
    """A table of blend's parts per stream."""
    found = []
    for stream in BLEND_STREAMS:
        rows = [folder for folder, switches in BLEND_PARTS.items() if _counts_on(stream, folder, switches)]
        if len(rows) > 1:
            found.append(f"{stream}/{{{','.join(rows)}}}")
    return found


TABLES = {
    "docs/blend.md": _blend_blocks(),
    "docs/measured.md": [
        "shapes",
        "caltech51",
        "ucf101",
        "ucf101-at-once",
        "imagenet150",
        *(f"caltech51-{n}" for n in (1, 2, 4, 8)),
        "cifar100",
        "cifar100-50",
        "attributes",
        "caltech51-online",
        "ucf101-online",
        "shapes-online",
        "cifar100-online",
        "shapes-eighth",
        "cifar100-eighth",
        "fm-lora-shapes",
        "fm-lora-cifar100",
        "spa-shapes",
        "spa-cifar100",
        *(f"drift/{name}" for name in DRIFT),
    ],
}
"""What a page shows, below `results`; some folders of one are named in braces."""

COMPARISONS = {
    "docs/measured.md": [
        "shapes/dmc-ot:shapes/dmc",
        "cifar100/dmc-ot-moving:cifar100/dmc-moving",
        "cifar100/dmc-ot-residual:cifar100/dmc-frozen",
        "spa-shapes/spa:spa-shapes/no-patches",
        "spa-cifar100/spa:spa-cifar100/no-patches",
    ],
}

Job = tuple[str, str, str, list[str], str]
"""Stream, folder, method (or `drift`, the laboratory), settings, seeds."""


BASELINES = (
    "simplecil",
    "lda",
    "acil",
    "ranpac",
    "aper",
    "clipood",
    "slca",
    "rapf",
    "cgil",
    "proof",
    "engine",
    "calfuse",
    "reco",
)
EXTRA = ("slca-2", "rapf-identity")
BOUNDS = ("zero-shot", "finetune", "joint")
VARIANTS = {
    "aper-lora": ("aper", ["tuning=lora"]),
    "aper-5": ("aper", ["schedule.epochs=5"]),
    "rapf-identity": ("rapf", ["start=identity"]),
    "joint-frozen": ("joint", ["stage1.tuning=none"]),
    "slca-2": ("slca", ["stage1.schedule.epochs=2"]),
    "dmc-ot-residual": ("dmc-ot", [RESIDUAL]),
    **{folder: ("calfuse", switches) for folder, switches in CALFUSE_PARTS.items()},
    **{folder: ("reco", switches) for folder, switches in RECO_PARTS.items()},
    **{folder: ("fm-lora", switches) for folder, switches in FM_LORA_PARTS.items()},
    "lora-8": ("finetune", LORA_8),
    "lora-8-gentle": ("finetune", [*LORA_8, "stage1.schedule.lr=3e-3"]),
    "segment-labelled": ("segment", ["unlabelled=false"]),
    **{folder: ("mccl", switches) for folder, switches in MCCL_PARTS.items()},
    **{folder: ("capnet", switches) for folder, switches in CAPNET_PARTS.items()},
    **{folder: ("sda", switches) for folder, switches in SDA_PARTS.items()},
}
"""Folders with other settings than their method's defaults; all others are named after it."""

ONLINE = ("simplecil", "lda", "acil", "ranpac", "blend")
"""Learn each image once, batch after batch."""

METHOD_ROWS = {
    "shapes": [
        *BOUNDS,
        *(name for name in BASELINES if name != "slca"),
        "aper-lora",
        *EXTRA,
        "dmc",
        "dmc-ot",
        "spa",
        *CALFUSE_PARTS,
        *RECO_PARTS,
        "fm-lora",
    ],
    "cifar100": [
        *BOUNDS,
        *(name for name in BASELINES if name not in ("aper", "slca")),
        "aper-5",
        *EXTRA,
        "dmc",
        "dmc-ot-residual",
        "spa",
        *CALFUSE_PARTS,
        *RECO_PARTS,
        "fm-lora",
    ],
    "caltech51": [*BOUNDS, *BASELINES, "rapf-identity", "dmc", "dmc-ot", "spa", *CALFUSE_PARTS, *RECO_PARTS],
    "imagenet150": [
        "zero-shot",
        "simplecil",
        "lda",
        "acil",
        "ranpac",
        "rapf",
        "rapf-identity",
        "calfuse",
        "calfuse-adapter",
        "engine",
        "dmc",
        "dmc-ot",
        "spa",
        "joint",
    ],
    "cifar100-50": [*BOUNDS, "simplecil", "dmc", "blend"],
    "attributes": ["zero-shot", "simplecil", "lda", "acil", "ranpac", "blend", "joint-frozen", "capnet", *CAPNET_PARTS],
    **{
        stream: ["fm-lora", *FM_LORA_PARTS, "lora-8", "lora-8-gentle"]
        for stream in ("fm-lora-shapes", "fm-lora-cifar100")
    },
    "shapes-eighth": ["zero-shot", "simplecil", "blend", "mccl", *MCCL_PARTS, "segment", "segment-labelled"],
    "cifar100-eighth": ["mccl", "mccl-labelled"],
    "caltech51-online": ["zero-shot", *ONLINE],
    "ucf101-online": ONLINE,
    "shapes-online": ["zero-shot", "simplecil", "lda", "blend", *SDA_PARTS],
    "cifar100-online": ["zero-shot", "simplecil", "lda", "blend", *SDA_PARTS],
}
"""What is compared on a stream, by folder."""


def jobs() -> list[Job]:
    found: list[Job] = []
    for stream, rows in METHOD_ROWS.items():
        for folder in rows:
            method, settings = VARIANTS.get(folder, (folder, []))
            if method in ("spa", "engine") and stream.startswith("cifar100"):
                settings = DESCRIBED
            found.append((stream, folder, method, settings, FIVE if stream == "shapes" and "dmc" in method else THREE))
    for method in (
        "simplecil",
        "lda",
        "acil",
        "ranpac",
        "aper",
        "slca",
        "rapf",
        "engine",
        "dmc",
        "dmc-ot",
        "spa",
        "joint",
    ):
        found.append(("ucf101", method, method, [], "1" if method == "simplecil" else THREE))
    for stream in BLEND_STREAMS:
        for folder, switches in BLEND_PARTS.items():
            if _counts_on(stream, folder, switches):
                found.append((stream, folder, "blend", switches, THREE))
    for n in (1, 2, 4, 8):
        for method in ("zero-shot", "simplecil", "lda", "ranpac", "engine", "dmc", "joint"):
            found.append((f"caltech51-{n}", method, method, [], THREE))
    found += [
        ("ucf101", "rapf-identity", "rapf", ["start=identity"], THREE),
        ("ucf101", "calfuse", "calfuse", [], THREE),
        *(("ucf101", folder, "calfuse", switches, THREE) for folder, switches in CALFUSE_PARTS.items()),
        ("ucf101", "reco", "reco", [], THREE),
        *(("ucf101", folder, "reco", switches, THREE) for folder, switches in RECO_PARTS.items()),
        ("ucf101", "dmc-frozen", "dmc", ["stage1.tuning=none"], THREE),
        ("ucf101-at-once", "acil", "acil", [], THREE),
        ("ucf101-at-once", "ranpac", "ranpac", [], THREE),
    ]
    found += [
        ("cifar100", "dmc-moving", "dmc", [MOVING], THREE),
        ("cifar100", "dmc-frozen", "dmc", ["stage1.tuning=none"], THREE),
        ("cifar100", "dmc-ot-moving", "dmc-ot", [RESIDUAL, MOVING], THREE),
    ]
    for name, switches in SPA_SWITCHES.items():
        found.append(("spa-shapes", name, "spa", switches, THREE))
        said = [] if name == "templates" else DESCRIBED
        found.append(("spa-cifar100", name, "spa", [*said, *switches], THREE))
    for name, (_, settings) in DRIFT.items():
        found.append(("drift", name, "drift", settings, "1" if name == "few-images" else THREE))
    return found


def where(job: Job) -> list[str]:
    return DRIFT[job[1]][0] if job[2] == "drift" else STREAMS[job[0]]


def command(job: Job) -> list[str]:
    stream, folder, method, settings, seeds = job
    flags = [part for setting in settings for part in ("--set", setting)]
    out = ["--out", f"results/{stream}/{folder}", "--seeds", seeds]
    return ["cairn", *(["drift"] if method == "drift" else ["run", method]), *where(job), *flags, *out]


def missing(job: Job) -> bool:
    return any(part.startswith("data/") and not (ROOT / part).exists() for part in where(job))


def done(job: Job) -> bool:
    """Runs skip what is finished by themselves; the laboratory does not."""
    return job[2] == "drift" and (ROOT / "results" / "drift" / job[1] / "drift.json").exists()


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
    cairn_script("methods.py")
    cairn_script("ranking.py")
    cairn_script("costs.py")
    cairn_script("heads.py", "--table")
    cairn_script("patches_on_object.py", "--out", "results/patches.json", "--into", "docs/measured.md")


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
