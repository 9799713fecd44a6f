"""The rows that are measured on every stream, by folder: methods, settings and seeds; and the tables that pages show of them."""

from __future__ import annotations

from streams import DESCRIBED, FEW_IMAGES, STREAMS, VALIDATED

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

RESIDUAL, MOVING = "stage2.text=residual", "stage1.schedule.lr=1e-3"
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

LAYERS = {"dmc-layers-3": ["stage1.tuning.layers=3"], "dmc-layers-1": ["stage1.tuning.layers=1"]}
"""Stage 1 with deltas in the last blocks alone."""

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
        "cifar100-b50",
        "cifar100-50",
        "attributes",
        "mosaics",
        "caltech51-online",
        "ucf101-online",
        "shapes-online",
        "cifar100-online",
        "shapes-eighth",
        "cifar100-eighth",
        "fm-lora-shapes",
        "fm-lora-cifar100",
        "layers-shapes",
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
EVERY = (*BOUNDS, *BASELINES, "dmc", "dmc-ot", "spa")
"""The methods of classes that learn task after task, at their own settings."""

TOLD = ("simplecil", "lda", "ranpac", "dmc")
"""Learn from labelled images alone, and with what a teacher tells of the others."""

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
    **{folder: ("dmc", switches) for folder, switches in LAYERS.items()},
    "lora-8": ("finetune", LORA_8),
    "lora-8-gentle": ("finetune", [*LORA_8, "stage1.schedule.lr=3e-3"]),
    **{f"{name}-told": (name, ["--pseudo-labels 1"]) for name in TOLD},
    "segment-labelled": ("segment", ["unlabelled=false"]),
    "blend-labelled": ("blend", ["unlabelled=false"]),
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
    "caltech51": [*EVERY, "rapf-identity", *CALFUSE_PARTS, *RECO_PARTS],
    **{f"caltech51-{n}": [*EVERY] for n in (1, 2, 4, 8)},
    "imagenet150": [*EVERY, "rapf-identity", "calfuse-adapter"],
    "cifar100-b50": [
        *BOUNDS,
        *(name for name in BASELINES if name not in ("aper", "slca")),
        "blend",
        "aper-5",
        *EXTRA,
        "dmc",
        "dmc-ot-residual",
        "spa",
    ],
    "cifar100-50": [*BOUNDS, "simplecil", "dmc", "blend"],
    "attributes": ["zero-shot", "simplecil", "lda", "acil", "ranpac", "blend", "joint-frozen", "capnet", *CAPNET_PARTS],
    "mosaics": [
        *("zero-shot", "simplecil", "lda", "acil", "ranpac", "blend"),
        *("capnet", "capnet-no-graph", "capnet-cross-entropy", "capnet-plain"),
    ],
    **{
        stream: ["fm-lora", *FM_LORA_PARTS, "lora-8", "lora-8-gentle"]
        for stream in ("fm-lora-shapes", "fm-lora-cifar100")
    },
    "layers-shapes": [*LAYERS],
    "shapes-eighth": [
        *("zero-shot", "blend", "blend-labelled", "mccl", *MCCL_PARTS, "segment", "segment-labelled"),
        *(folder for name in TOLD for folder in (name, f"{name}-told")),
    ],
    "cifar100-eighth": [
        *("zero-shot", "blend", "blend-labelled", "mccl", "mccl-labelled"),
        *(folder for name in TOLD for folder in (name, f"{name}-told")),
    ],
    "caltech51-online": ["zero-shot", *ONLINE],
    "ucf101-online": ONLINE,
    "shapes-online": ["zero-shot", "simplecil", "lda", "blend", *SDA_PARTS],
    "cifar100-online": ["zero-shot", "simplecil", "lda", "blend", *SDA_PARTS],
}
"""What is compared on a stream, by folder."""


def variant(stream: str, folder: str) -> tuple[str, list[str]]:
    """The method and the settings of a row."""
    method, settings = VARIANTS.get(folder, (folder, []))
    if method in ("spa", "engine") and stream.startswith("cifar100"):
        settings = DESCRIBED
    return method, settings


def jobs() -> list[Job]:
    found: list[Job] = []
    for stream, rows in METHOD_ROWS.items():
        for folder in rows:
            method, settings = variant(stream, folder)
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
        found.append(("ucf101", method, method, [], THREE))
    for stream in BLEND_STREAMS:
        for folder, switches in BLEND_PARTS.items():
            if _counts_on(stream, folder, switches):
                found.append((stream, folder, "blend", switches, THREE))
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
        ("cifar100", "dmc-low-rank", "dmc", ["stage1.tuning=none", "covariance=low_rank"], THREE),
        ("cifar100", "dmc-ot-moving", "dmc-ot", [RESIDUAL, MOVING], THREE),
    ]
    for name, switches in SPA_SWITCHES.items():
        found.append(("spa-shapes", name, "spa", switches, THREE))
        said = [] if name == "templates" else DESCRIBED
        found.append(("spa-cifar100", name, "spa", [*said, *switches], THREE))
    for name, (_, settings) in DRIFT.items():
        found.append(("drift", name, "drift", settings, "1" if name == "few-images" else THREE))
    return found
