"""What a task costs RanPAC's sums of squares once there are more images than random features, without encoding and drawing them.

n images join m random features of which the square root R is kept, then G + lam I is solved for four ridges. The plain form
factorises [R; H] as a whole, makes Q, multiplies R R^T in full, and does so twice: with a fifth of the images held out, and with
all. Ours joins the rows to the triangle, once each.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import Row, in_turns
from torch import Tensor

from cairn.maths.ridge import compressed, joined_to_triangle, one_hot, solved, squared

SIZES = {
    "full": {"m": 4000, "n": 2000, "classes": 100, "repeats": 3},
    "quick": {"m": 1000, "n": 500, "classes": 100, "repeats": 1},
}
RIDGES = (10.0, 100.0, 1000.0)
"""The ridge of the task before, and its neighbours; the best of them serves all images, too."""


def measured(m: int, n: int, classes: int, repeats: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    V = torch.randn(512, m, generator=rng)
    z = torch.nn.functional.normalize(torch.randn(m + n, 512, generator=rng) * torch.logspace(0, -1.5, 512), dim=1)
    old, H = torch.relu(z @ V).split([m, n])
    labels = one_hot(torch.arange(m + n) % classes, classes).float()
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

    found = in_turns({"plain": plain, "ours": ours}, repeats)
    W = {way: own.value for way, own in found.items()}
    return {
        "m": m,
        "n": n,
        "seconds": {way: own.seconds for way, own in found.items()},
        "all_seconds": {way: own.all_seconds for way, own in found.items()},
        "extra_bytes": {way: own.extra_bytes for way, own in found.items()},
        "scores_difference": float((H @ (W["plain"] - W["ours"])).abs().max()),
        "same_answers": float(((H @ W["plain"]).argmax(1) == (H @ W["ours"]).argmax(1)).float().mean()),
        "stored_bytes": {"plain": 4 * m * m, "ours": 2 * m * (m + 1)},
    }


def rows(report: dict[str, Any]) -> list[Row]:
    item = f"RanPAC's sums, {report['n']:,} images join {report['m']:,} random features"
    seconds, extra, stored = report["seconds"], report["extra_bytes"], report["stored_bytes"]
    equal = f"{100 * report['same_answers']:.0f} % of answers, scores {report['scores_difference']:.0e}"
    return [
        Row(
            item,
            "factorised whole, twice",
            seconds["plain"],
            "joined to the triangle",
            seconds["ours"],
            extra_bytes=extra["ours"],
            plain_extra_bytes=extra["plain"],
            equal=equal,
        ),
        Row("its square root stored", "whole", stored["plain"], "one triangle", stored["ours"], unit="B"),
    ]
