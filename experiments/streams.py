"""The streams of tasks that results are measured on, each as the words of its call; see `results.py` for where the sets are."""

from __future__ import annotations

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
    "cifar100-b50": [*PHOTOGRAPHS, "--base", "50", "--order", "seed:1993"],
    "attributes": ["--data", "attributes"],
    "mosaics": [
        *("--data", "mosaic=data/cifar100", "--towers", "data/mini-clip", "--step", "10"),
        *("--order", "seed:1993", "--imbalance", "50"),
    ],
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
    "fm-lora-cifar100": [*PHOTOGRAPHS, "--order", "seed:1993", "--limit-train", "20"],
    "layers-shapes": ["--data", "shapes"],
    "spa-shapes": ["--data", "shapes"],
    "spa-cifar100": [*PHOTOGRAPHS, "--order", "seed:1993"],
}

VALIDATED = [*PHOTOGRAPHS, "--order", "seed:1993", "--validation", "0.2"]

FEW_IMAGES = "build/few-images.safetensors"
"""A features file of CUB's size, made by `experiments/few_images.py` when it is needed."""

DESCRIBED = ["descriptions=examples/cifar100-descriptions.json"]
"""The photographs bring no descriptions of their own."""
