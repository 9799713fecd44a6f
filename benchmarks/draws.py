"""Drawing from class Gaussians: against the bare random numbers and one product, and against torch's own distribution.

Memories that were drawn from before, as in training: factors are there. Low-rank classes have rank 16. Many classes are
made of a hundred distinct ones, since only their number matters to time and memory.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Row, in_turns
from standins import class_rows, old_classes
from torch.distributions import LowRankMultivariateNormal

from cairn.maths.shrinkage import Ridge
from cairn.memory.covariances import LowRank
from cairn.memory.gaussians import GaussianMemory

SIZES = {
    "full": {"classes": 100, "per_class": 256, "d": 512, "many": 10_000, "repeats": 7},
    "quick": {"classes": 100, "per_class": 256, "d": 512, "many": 10_000, "repeats": 3},
    "tiny": {"classes": 4, "per_class": 8, "d": 32, "many": 20, "repeats": 1},
}
RANK, IMAGES, FEW, CHECKED = 16, 60, 4, 20_000
"""Rank; features a class is learned from; draws of each of many classes; draws of one class to compare its covariance with."""


def repeated(memory: GaussianMemory, times: int) -> GaussianMemory:
    """The memory's classes, `times` over."""
    state = {name: torch.cat([tensor] * times) for name, tensor in memory.state_dict().items()}
    return GaussianMemory.from_state(state, memory.kind, memory.shrinkage)


def torch_gaussians(memory: GaussianMemory) -> LowRankMultivariateNormal:
    """The same Gaussians as torch has them."""
    state = memory.state_dict()
    root = state["U"] * state["lam"].sqrt()[:, None, :]
    return LowRankMultivariateNormal(state["means"], root, state["rest"], validate_args=False)


def covariance_error(x: torch.Tensor, S: torch.Tensor) -> float:
    """Relative error of the rows' covariance, Frobenius."""
    return float((torch.cov(x.T.double(), correction=0) - S).norm() / S.norm())


def measured(classes: int, per_class: int, d: int, many: int, repeats: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}

    def keep(what: str, taken: dict[str, Any], **more: Any) -> None:
        found[what] = more | {
            way: {"seconds": own.seconds, "all_seconds": own.all_seconds, "extra_bytes": own.extra_bytes}
            for way, own in taken.items()
        }

    full = old_classes(classes, d, IMAGES)
    factor = torch.linalg.cholesky(full.covariance(0)).float()
    full.draw(1, rng)
    taken = in_turns(
        {
            "bare": lambda: torch.randn(classes * per_class, d, generator=rng) @ factor.T,
            "ours": lambda: full.draw(per_class, rng)[0],
        },
        repeats,
    )
    keep("full", taken, difference=_difference_from_naive(full, per_class))

    # Read as it is stored: torch's distribution knows no shrinkage
    low = GaussianMemory(d, LowRank(rank=min(RANK, d)), Ridge(eps=0.0)).add(*class_rows(classes, d, IMAGES))
    theirs = torch_gaussians(low)
    low.draw(1, rng)
    taken = in_turns(
        {"torch": lambda: theirs.rsample((per_class,)), "ours": lambda: low.draw(per_class, rng)[0]}, repeats
    )
    S = low.covariance(0)
    torch.manual_seed(0)
    one = torch_gaussians(
        GaussianMemory.from_state({n: t[:1] for n, t in low.state_dict().items()}, low.kind, low.shrinkage)
    )
    keep(
        "low_rank",
        taken,
        bytes=low.bytes,
        full_bytes=full.bytes,
        covariance_error=covariance_error(low.draw(CHECKED, rng, [0])[0], S),
        torch_covariance_error=covariance_error(one.rsample((CHECKED,))[:, 0], S),
    )

    crowd = repeated(low, many // classes)
    theirs = torch_gaussians(crowd)
    # The first draw from these many makes and keeps their factors: that is the peak
    taken = in_turns({"ours": lambda: crowd.draw(FEW, rng)[0], "torch": lambda: theirs.rsample((FEW,))}, repeats)
    keep(
        "many",
        taken,
        bytes=crowd.bytes,
        full_bytes=crowd.classes * (8 + 4 * d + 2 * d * (d + 1)),
        classes=crowd.classes,
        result_bytes=taken["ours"].value.nbytes,
    )
    return {"classes": classes, "per_class": per_class, "d": d, "rank": RANK, "few": FEW} | found


def _difference_from_naive(memory: GaussianMemory, n: int) -> float:
    """Largest difference of draws from mu + L z, class by class and row by row, from the same random numbers."""
    drawn = memory.draw(n, torch.Generator().manual_seed(1), [0, 1])[0].view(2, n, -1)
    z = torch.randn(2, n, memory.dim, generator=torch.Generator().manual_seed(1)).double()
    worst = 0.0
    for c in range(2):
        L = torch.linalg.cholesky(memory.covariance(c))
        naive = torch.stack([memory.mean(c) + L @ row for row in z[c]])
        worst = max(worst, float((drawn[c] - naive).abs().max()))
    return worst


def rows(report: dict[str, Any]) -> list[Row]:
    k, n, d, r = (report[key] for key in ("classes", "per_class", "d", "rank"))
    full, low, many = (report[key] for key in ("full", "low_rank", "many"))

    def compared(what: str, plain: str, entry: dict[str, Any], key: str, **more: Any) -> Row:
        return Row(
            what,
            plain,
            entry[key]["seconds"],
            "`draw`",
            entry["ours"]["seconds"],
            extra_bytes=entry["ours"]["extra_bytes"],
            plain_extra_bytes=entry[key]["extra_bytes"],
            **more,
        )

    errors = (
        f"covariance of {CHECKED:,} draws {low['covariance_error']:.3f} from the true one "
        f"(torch {low['torch_covariance_error']:.3f})"
    )
    return [
        compared(
            f"{n} draws of each of {k} full Gaussians, d = {d}",
            "random numbers and one product",
            full,
            "bare",
            target=1 / 1.3,
            equal=f"mu + L z row by row {full['difference']:.0e}",
        ),
        compared(f"the same of rank {r}", "torch's LowRankMultivariateNormal", low, "torch", target=1.0, equal=errors),
        Row(
            f"{k} classes stored",
            "full",
            low["full_bytes"],
            f"rank {r}",
            low["bytes"],
            "B",
            target=10.0,
            equal="variances exact, covariances of the leading directions",
        ),
        Row(
            f"{many['classes']:,} classes stored",
            "full (computed)",
            many["full_bytes"],
            f"rank {r}",
            many["bytes"],
            "B",
            target=10.0,
        ),
        compared(
            f"{report['few']} draws of each of {many['classes']:,} classes of rank {r}",
            "torch's LowRankMultivariateNormal",
            many,
            "torch",
            equal=f"the draws are {many['result_bytes'] / 1e6:.0f} MB of the extra memory; the first draw makes factors",
        ),
    ]
