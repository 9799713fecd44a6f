"""A features file like CUB's: many classes, fewer images than directions, drawn from correlated Gaussians on the sphere.

200 bird-like classes lie in 20 families; a class is a Gaussian around its family, with a covariance that the families
share in part and whose spectrum falls by two decades; texts stand off from the class means, as CLIP's do.

    python experiments/few_images.py cub-like.safetensors
    cairn drift --data cub-like.safetensors --step 20 --seeds 1,2,3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cairn.data.embeddings import save_features


def few_images(classes: int = 200, dim: int = 512, train: int = 30, test: int = 30, seed: int = 0) -> dict:
    """The arguments of `save_features`, rows of unit norm."""
    rng = np.random.default_rng(seed)
    spectrum = np.geomspace(1.0, 0.01, dim)
    families = max(2, classes // 10)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    cone = 1.5 * rng.normal(size=dim) / dim**0.5
    centres = cone + rng.normal(size=(families, dim)) / dim**0.5
    mixing = [turn * spectrum * np.exp(0.3 * rng.normal(size=dim)) / dim**0.5 for _ in range(families)]
    texts, rows = [], {"train": [], "test": []}
    for c in range(classes):
        family = c % families
        mean = centres[family] + 0.5 * mixing[family] @ rng.normal(size=dim) * 2
        texts.append(mean + 0.4 * rng.normal(size=dim) / dim**0.5 + 0.3)
        for part, number in (("train", train), ("test", test)):
            rows[part].append(mean + 3.0 * rng.normal(size=(number, dim)) @ mixing[family].T)

    def unit(parts: list) -> np.ndarray:
        x = np.concatenate(parts) if parts[0].ndim == 2 else np.stack(parts)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    return {
        "train_features": unit(rows["train"]),
        "train_labels": np.repeat(np.arange(classes), train),
        "test_features": unit(rows["test"]),
        "test_labels": np.repeat(np.arange(classes), test),
        "text_features": unit(texts),
        "class_names": [f"bird {c:03d}" for c in range(classes)],
        "templates": ("a photo of a {}, a type of bird.",),
        "logit_scale": 100.0,
        "model": "synthetic",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save_features(args.out, **few_images(seed=args.seed))


if __name__ == "__main__":
    main()
