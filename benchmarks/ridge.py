"""What a task costs RanPAC's sums of squares, without encoding its images and drawing their random features.

Two states of a stream, of which m random features keep the square root R of the sums; then four ridges are solved for, the last
with all images:

- fewer images than features. The plain form is the paper's: the m x m sum G, and (G + lam I)^-1 C for each of its 17 ridges, with a
  fifth of the images held out, and once more with all; by Cholesky factors, where the published code has a general solver. Ours
  solves for the rows' products R R^T, of which those of earlier tasks are at hand, and goes from the last ridge to the best.
- more. The plain form factorises [R; H] as a whole, makes Q, multiplies R R^T in full, and does so twice: with the fifth held out,
  and with all. Ours joins the rows to the triangle, once each.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Row, in_turns
from torch import Tensor

from cairn.maths.ridge import compressed, joined_to_triangle, one_hot, solved, squared
from cairn.memory.second_order import SecondOrder

SIZES = {
    "full": {"m": 4000, "n": 2000, "classes": 100, "repeats": 3},
    "quick": {"m": 1000, "n": 500, "classes": 100, "repeats": 1},
}
RIDGES = (10.0, 100.0, 1000.0)
"""The ridge of the task before, and its neighbours; the best of them serves all images, too."""

ALL = [10.0**exponent for exponent in range(-8, 9)]


def measured(m: int, n: int, classes: int, repeats: int) -> dict[str, Any]:
    return {"m": m, "n": n, "more": with_more(m, n, classes, repeats), "fewer": with_fewer(m, n // 4, classes, repeats)}


def random_features(m: int, number: int, classes: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    V = torch.randn(512, m, generator=rng)
    z = torch.nn.functional.normalize(torch.randn(number, 512, generator=rng) * torch.logspace(0, -1.5, 512), dim=1)
    return torch.relu(z @ V), one_hot(torch.arange(number) % classes, classes).float()


def with_fewer(m: int, n: int, classes: int, repeats: int) -> dict[str, Any]:
    """n images after m / 2 others."""
    H, Y = random_features(m, m // 2 + n, classes)
    (old, H), (before, Y), out = H.split([m // 2, n]), Y.split([m // 2, n]), n // 5
    G, C = old.double().T @ old.double(), old.double().T @ before.double()
    sums = SecondOrder.empty(m).joined(old, before)
    sums.solution(RIDGES[1])

    def plain() -> Tensor:
        learned, C_learned = G + H[out:].double().T @ H[out:].double(), C + H[out:].double().T @ Y[out:].double()
        for lam in ALL:
            _ = ((H[:out] @ solved(learned, C_learned, lam).float() - Y[:out]) ** 2).mean()
        every = G + H.double().T @ H.double()
        return solved(every, C + H.double().T @ Y.double(), RIDGES[1]).float()

    def ours() -> Tensor:
        learned = sums.joined(H[out:], Y[out:])
        for lam in RIDGES:
            _ = learned.error(H[:out], Y[:out], lam)
        return sums.joined(H, Y, torch.Generator().manual_seed(0)).solution(RIDGES[1])

    return compared({"plain": plain, "ours": ours}, repeats, H) | {"n": n}


def compared(ways: dict[str, Any], repeats: int, H: Tensor) -> dict[str, Any]:
    found = in_turns(ways, repeats)
    W = {way: own.value for way, own in found.items()}
    return {
        "seconds": {way: own.seconds for way, own in found.items()},
        "all_seconds": {way: own.all_seconds for way, own in found.items()},
        "extra_bytes": {way: own.extra_bytes for way, own in found.items()},
        "scores_difference": float((H @ (W["plain"] - W["ours"])).abs().max()),
        "same_answers": float(((H @ W["plain"]).argmax(1) == (H @ W["ours"]).argmax(1)).float().mean()),
    }


def with_more(m: int, n: int, classes: int, repeats: int) -> dict[str, Any]:
    """n images after m others."""
    H, labels = random_features(m, m + n, classes)
    old, H = H.split([m, n])
    (R, D0), Y, out = (
        compressed(torch.cat([old, H[:1]]), torch.cat([labels[:m], labels[m : m + 1]])),
        labels[m:],
        n // 5,
    )

    def whole(R: Tensor, D: Tensor, H: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Q, R = torch.linalg.qr(torch.cat([R, H]))
        return R, Q.T @ torch.cat([D, Y]), R.double() @ R.double().T

    def plain() -> Tensor:
        learned, D, K = whole(R, D0, H[out:], Y[out:])
        for lam in (*RIDGES, RIDGES[1]):
            _ = learned.T @ solved(K, D, lam).float()
        every, D, K = whole(R, D0, H, Y)
        return every.T @ solved(K, D, RIDGES[1]).float()

    def ours() -> Tensor:
        learned, D = joined_to_triangle(R, D0, H[out:], Y[out:])
        K = squared(learned, triangle=True)
        for lam in RIDGES:
            _ = learned.T @ solved(K, D, lam).float()
        every, D = joined_to_triangle(learned, D, H[:out], Y[:out])
        return every.T @ solved(squared(every, triangle=True), D, RIDGES[1]).float()

    stored = {"plain": 4 * m * m, "ours": 2 * m * (m + 1)}
    return compared({"plain": plain, "ours": ours}, repeats, H) | {"n": n, "stored_bytes": stored}


def rows(report: dict[str, Any]) -> list[Row]:
    more, found = report["more"], []
    for state, plain, ours, target in (
        ("fewer", "the sum of squares, 17 ridges", "products of rows, from the last ridge", 5.0),
        ("more", "factorised whole, twice", "joined to the triangle", None),
    ):
        one, before = report[state], report["m"] // (2 if state == "fewer" else 1)
        seconds, extra = one["seconds"], one["extra_bytes"]
        found.append(
            Row(
                f"RanPAC's sums, {one['n']:,} images join {before:,} on {report['m']:,} random features",
                plain,
                seconds["plain"],
                ours,
                seconds["ours"],
                target=target,
                extra_bytes=extra["ours"],
                plain_extra_bytes=extra["plain"],
                equal=f"{100 * one['same_answers']:.0f} % of answers, scores {one['scores_difference']:.0e}",
            )
        )
    stored = more["stored_bytes"]
    return [*found, Row("its square root stored", "whole", stored["plain"], "one triangle", stored["ours"], unit="B")]
