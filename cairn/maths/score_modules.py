"""Scores as modules of plain products, in float32: what a learner is outside of Python (see `cairn.classifier.onnx`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cairn.maths.similarity import unit


class RandomFeatureScores(nn.Module):
    """s h W of the random features h = relu(z V) of a unit row z; V None: h = z."""

    V: Tensor | None
    W: Tensor

    def __init__(self, V: Float[Tensor, "d m"] | None, W: Float[Tensor, "m k"], s: float):
        super().__init__()
        self.register_buffer("V", None if V is None else V.detach().cpu().float())
        self.register_buffer("W", (s * W.detach().cpu().double()).float())

    def forward(self, x: Tensor) -> Tensor:
        z = unit(x)
        return (z if self.V is None else torch.relu(z @ self.V)) @ self.W


class QuadraticScores(nn.Module):
    """-(a_c (|z - m_c|^2 - |P_c (z - m_c)|^2) + b_c) / 2 with z = W (x - o): see `cairn.maths.quadratic_discriminant`.

    P (k, r, d) has rows of 0 where a class has fewer than r.
    """

    origin: Tensor
    W: Tensor
    middles: Tensor
    P: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(
        self,
        origin: Float[Tensor, " d"],
        W: Float[Tensor, "d d"],
        middles: Float[Tensor, "k d"],
        P: Float[Tensor, "k r d"],
        scale: Float[Tensor, " k"],
        offset: Float[Tensor, " k"],
    ):
        super().__init__()
        shift = torch.einsum("krd,kd->kr", P.double(), middles.double())
        parts = {"origin": origin, "W": W, "middles": middles, "scale": scale, "offset": offset, "shift": shift}
        for name, value in (parts | {"P": P.flatten(0, 1)}).items():
            self.register_buffer(name, value.detach().cpu().float())
        self.rank = P.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.origin) @ self.W.T
        squares = z.square().sum(1, keepdim=True) - 2 * z @ self.middles.T + self.middles.square().sum(1)
        if self.rank:
            within = (z @ self.P.T).unflatten(1, (-1, self.rank)) - self.shift
            squares = squares - within.square().sum(2)
        return -(self.scale * squares + self.offset) / 2


class PooledScores(nn.Module):
    """sum_e w_e E_e(x) + b, experts on the same row; the text expert looks at its first `width` numbers."""

    b: Tensor

    def __init__(self, experts: Sequence[nn.Module], weights: Sequence[float], b: Float[Tensor, " k"]):
        super().__init__()
        self.experts, self.weights = nn.ModuleList(experts), [float(weight) for weight in weights]
        self.register_buffer("b", b.detach().cpu().float())

    def forward(self, x: Tensor) -> Tensor:
        scores = [weight * expert(x) for expert, weight in zip(self.experts, self.weights, strict=True)]
        return torch.stack(scores).sum(0) + self.b


class FirstColumns(nn.Module):
    """Another module on the first columns of a row."""

    def __init__(self, width: int, module: nn.Module):
        super().__init__()
        self.width, self.module = width, module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x[:, : self.width])


class UnitRows(nn.Module):
    """Unit embeddings."""

    def __init__(self, vision: nn.Module):
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        return unit(self.vision(pixels))


class CalibratedScores(nn.Module):
    """Scores s, and probabilities softmax(s / (T m^q)), m = max s - mean s: see `cairn.maths.calibration`."""

    def __init__(self, scores: nn.Module, temperature: float, power: float):
        super().__init__()
        self.scores, self.temperature, self.power = scores, temperature, power

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s = self.scores(rows)
        apart = s - s.amax(1, keepdim=True)
        spread = (-apart.mean(1, keepdim=True)).clamp_min(1e-30) ** self.power
        return s, torch.softmax(apart / (self.temperature * spread), 1)


class IndependentScores(nn.Module):
    """Scores s, and of each class by itself sigmoid(a (s - mean s) + o), or with s alone unless `centred`: see
    `cairn.classifier.label_sets`."""

    offsets: Tensor

    def __init__(self, scores: nn.Module, a: float, offsets: Float[Tensor, " k"], centred: bool):
        super().__init__()
        self.scores, self.a, self.centred = scores, a, centred
        self.register_buffer("offsets", offsets.float())

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        s = self.scores(rows)
        v = s - s.mean(1, keepdim=True) if self.centred else s
        return s, torch.sigmoid(self.a * v + self.offsets)


class PatchMoments(nn.Module):
    """The unit blocks of a row: the image's embedding, mean and, with three blocks, deviation of its unit patches."""

    def __init__(self, vision: nn.Module, blocks: int):
        super().__init__()
        self.vision, self.blocks = vision, blocks

    def forward(self, pixels: Tensor) -> Tensor:
        if self.blocks == 1:
            return unit(self.vision(pixels))
        z, p = self.vision(pixels)
        p = p / torch.linalg.vector_norm(p, dim=-1, keepdim=True).clamp_min(1e-12)
        mean = p.mean(1)
        parts = [z, mean]
        if self.blocks == 3:
            parts.append((p - mean[:, None]).square().mean(1).sqrt())
        return torch.cat([unit(part) for part in parts], 1) / math.sqrt(self.blocks)
