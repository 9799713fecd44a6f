"""The optimal transport map of one Gaussian onto another, against POT's on the same torch tensors, float64.

Covariances of correlated, anisotropic rows. No ridge on our side, so that both solve A S0 A^T = S1 itself.
"""

from __future__ import annotations

from typing import Any

import ot
import torch
from measure import Row, in_turns

from cairn.maths.bures import gaussian_map

SIZES = {"full": {"d": 512, "repeats": 15}, "quick": {"d": 512, "repeats": 5}, "tiny": {"d": 16, "repeats": 1}}


def moments_of(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of 4 d correlated rows whose standard deviations span a factor of ten."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    x = torch.randn(4 * d, d, generator=rng, dtype=torch.float64) @ mixing.T / d**0.5
    return torch.randn(d, generator=rng, dtype=torch.float64), torch.cov(x.T, correction=0)


def measured(d: int, repeats: int) -> dict[str, Any]:
    (m0, S0), (m1, S1) = moments_of(d, 0), moments_of(d, 1)
    ways = {
        "POT": lambda: ot.gaussian.bures_wasserstein_mapping(m0, m1, S0, S1)[0],
        "gaussian_map": lambda: gaussian_map(m0, S0, m1, S1, reg=0.0).A,
    }
    found = in_turns(ways, repeats)
    theirs = found["POT"].value
    return {
        "d": d,
        "rows": [
            {
                "way": way,
                "seconds": own.seconds,
                "all_seconds": own.all_seconds,
                "extra_bytes": own.extra_bytes,
                "residual": float((own.value @ S0 @ own.value.mT - S1).norm() / S1.norm()),
                "to_pot": float((own.value - theirs).norm() / theirs.norm()),
            }
            for way, own in found.items()
        ],
    }


def rows(report: dict[str, Any]) -> list[Row]:
    plain, own = report["rows"]
    equal = f"map {own['to_pot']:.0e}; residual of A S0 A - S1 {own['residual']:.0e} (POT {plain['residual']:.0e})"
    return [
        Row(
            f"Gaussian map, d = {report['d']}, float64",
            plain["way"],
            plain["seconds"],
            "`gaussian_map`",
            own["seconds"],
            target=1.0,
            equal=equal,
            extra_bytes=own["extra_bytes"],
            plain_extra_bytes=plain["extra_bytes"],
        )
    ]
