"""Stand-ins of real size: towers of random weights (times do not depend on weights) and classes of correlated features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from cairn.maths.similarity import unit
from cairn.memory.covariances import Covariance
from cairn.memory.gaussians import GaussianMemory
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.preprocessing import Preprocessing


def vit_b(patch: int, image_layers: int = 12) -> ClipTowers:
    """ViT-B with this patch size and CLIP's text tower, embeddings of 512; weights random, the tokenizer the embedded one."""
    return vit_b_and_model(patch, image_layers)[0]


def vit_b_and_model(patch: int, image_layers: int = 12) -> tuple[ClipTowers, CLIPModel]:
    """The same, and transformers' model inside it."""
    torch.manual_seed(0)
    tiny = load_towers("tiny", device="cpu")
    text = {"vocab_size": 49408, "bos_token_id": tiny.bos, "eos_token_id": tiny.eos, "pad_token_id": 1}
    vision = {"patch_size": patch, "image_size": 224, "num_hidden_layers": image_layers}
    config = CLIPConfig(projection_dim=512, text_config=text, vision_config=vision)
    name = f"random ViT-B/{patch}"
    model = CLIPModel(config)
    return ClipTowers(model, tiny.tokenizer, Preprocessing(size=224), name=name, device="cpu"), model


class Noise:
    """Photographs of nothing, 256 x 256."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (256, 256, 3), dtype=np.uint8)

    def describe(self, index: int) -> str:
        return f"noise {index}"


def class_rows(k: int, d: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n correlated, anisotropic unit rows of each of k classes, and their labels 0..k-1. One mixing serves every seed."""
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(0)) / d**0.5 * torch.logspace(0, -1.5, d)
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(k, 1, d, generator=rng) @ mixing + 0.5 * torch.randn(k, n, d, generator=rng) @ mixing
    return unit(x.flatten(0, 1)), torch.arange(k).repeat_interleave(n)


def old_classes(k: int, d: int, n: int, covariance: Covariance | None = None) -> GaussianMemory:
    """Gaussians of k classes, each of n such rows."""
    return GaussianMemory(d, covariance).add(*class_rows(k, d, n))


def clustered_rows(*shape: int, d: int, clusters: int, spread: float, rng: torch.Generator) -> Tensor:
    """Unit rows around a few random centres, `spread` the length of their noise per coordinate beside the centre's."""
    centres = torch.randn(clusters, d, generator=rng)
    which = torch.randint(clusters, shape, generator=rng)
    return normalize(centres[which] + spread * torch.randn(*shape, d, generator=rng), dim=-1)
