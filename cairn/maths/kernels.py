"""Kernels: inner products of features that are never written down."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cairn.maths.similarity import unit


def arc_cosine(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """k(x, y) = (sin a + (pi - a) cos a) / pi in float64, a the angle between x and y: 1 where it is 0, 0 where it is pi.

    It is 2 E[relu(v.x) relu(v.y)] of unit x, y over normal v with variance 1: what the inner product of random features tends to,
    divided by half their number, as they become more.
    Source: Cho and Saul, Kernel Methods for Deep Learning (2009), the kernel of order 1.
    """
    cos = (unit(x.double()) @ unit(y.double()).T).clamp(-1, 1)
    angle = torch.acos(cos)
    return ((1 - cos * cos).sqrt() + (math.pi - angle) * cos) / math.pi
