"""Entropic plans of many small problems until the worst marginal is within 1 %, against POT's batched solver.

6,400 problems of 32 x 16 with clustered cosine costs, uniform weights, float32. Both forms of POT sweep as ours do, rows
then columns from zero duals, so POT is given exactly the sweeps that it needs for the same error; its own test of
convergence, every ten sweeps, is switched off by tol=0 but still computed.
"""

from __future__ import annotations

from typing import Any

import ot
import torch
from measure import Row, in_turns
from standins import clustered_rows
from torch import Tensor

from cairn.maths.transport import sinkhorn_kernel, sinkhorn_log

SIZES = {
    "full": {"problems": 6400, "repeats": 15},
    "quick": {"problems": 6400, "repeats": 1},
    "tiny": {"problems": 16, "repeats": 1},
}
ROWS, COLUMNS, TOLERANCE, LIMIT = 32, 16, 1e-2, 100_000
TARGET = 2.0


def clustered_costs(problems: int) -> Tensor:
    """Cosine costs between rows around the same four centres on both sides: slow to converge, as real ones are."""
    rng = torch.Generator().manual_seed(0)
    rows = clustered_rows(problems, ROWS + COLUMNS, d=16, clusters=4, spread=0.3, rng=rng)
    return 1 - rows[:, :ROWS] @ rows[:, ROWS:].mT


def worst_error(P: Tensor) -> float:
    """Largest relative error of a row or column sum, uniform weights."""
    return float(max((P.sum(-1) * P.shape[-2] - 1).abs().max(), (P.sum(-2) * P.shape[-1] - 1).abs().max()))


def measured(problems: int, repeats: int) -> dict[str, Any]:
    C = clustered_costs(problems)
    found = []
    for eps in (0.1, 0.05):
        how = {"eps": eps, "iterations": LIMIT, "tolerance": TOLERANCE}
        needed = sinkhorn_log(C, **how).iterations

        def pot(method: str, eps: float = eps, needed: int = needed) -> Tensor:
            return ot.solve_batch(C, reg=eps, max_iter=needed, tol=0.0, method=method, grad="detach").plan

        ways = {
            "POT sinkhorn": lambda pot=pot: pot("sinkhorn"),
            "sinkhorn_kernel": lambda how=how: sinkhorn_kernel(C, **how),
            "POT log_sinkhorn": lambda pot=pot: pot("log_sinkhorn"),
            "sinkhorn_log": lambda how=how: sinkhorn_log(C, **how),
        }
        taken = in_turns(ways, repeats)
        reference = taken["POT log_sinkhorn"].value
        for way, own in taken.items():
            P = own.value if isinstance(own.value, Tensor) else own.value.P
            found.append(
                {
                    "eps": eps,
                    "way": way,
                    "seconds": own.seconds,
                    "all_seconds": own.all_seconds,
                    "extra_bytes": own.extra_bytes,
                    "error": worst_error(P),
                    "iterations": needed if isinstance(own.value, Tensor) else own.value.iterations,
                    "mass_elsewhere": float((P - reference).abs().sum((-2, -1)).max()) / 2,
                }
            )
    return {"problems": problems, "rows_and_columns": [ROWS, COLUMNS], "tolerance": TOLERANCE, "rows": found}


def rows(report: dict[str, Any]) -> list[Row]:
    n, m = report["rows_and_columns"]
    made = []
    for plain, own in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        # eps and the pair: POT's kernel form and ours, POT's log domain and ours
        equal = (
            f"worst marginal {100 * own['error']:.2f} % off after {own['iterations']} sweeps (POT "
            f"{100 * plain['error']:.2f} % after {plain['iterations']}); at most {own['mass_elsewhere']:.0e} of the mass elsewhere"
        )
        made.append(
            Row(
                f"{report['problems']:,} plans of {n} x {m}, eps {own['eps']}",
                plain["way"],
                plain["seconds"],
                f"`{own['way']}`",
                own["seconds"],
                equal=equal,
                extra_bytes=own["extra_bytes"],
                target=TARGET if "kernel" in own["way"] else None,
                plain_extra_bytes=plain["extra_bytes"],
            )
        )
    return made
