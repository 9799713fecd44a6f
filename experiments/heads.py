"""Where DMC loses against heads in closed form: its own Gaussians, read by its texts and by discriminant analysis.

    python experiments/heads.py [--out results/heads.json] [--into docs/measured.md] [--table]

After the last task of a stream that no table reports, the test images are classified twice: by the method's class texts, and
by discriminant analysis on the very Gaussians that it keeps, covariances pooled. Beside it stands `lda` on the frozen tower.
Last accuracy, three seeds.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from stored import arguments, measured_rows, write_block

from cairn.data.loading import Loader
from cairn.experiment.inputs import prepared
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.memory.gaussians import GaussianMemory
from cairn.reports.formats import Column, Table, estimate

STREAMS = {
    "shapes:dev": {"data": "shapes:dev"},
    "cifar100, held-out training images": {
        "data": "data/cifar100",
        "towers": "data/mini-clip",
        "step": 10,
        "order": "seed:1993",
        "validation": 0.2,
    },
}
RUNS = {
    "dmc, tower frozen": ("dmc", ("stage1.tuning=none",)),
    "lda": ("lda", ()),
}
SEEDS = (1, 2, 3)


def pooled_scores(z: torch.Tensor, memory: GaussianMemory) -> torch.Tensor:
    """z^T S^-1 mu_c - mu_c^T S^-1 mu_c / 2 with S = sum_c n_c S_c / sum_c n_c, S_c as the memory reads it."""
    n = memory.counts.double()
    S = sum(n[c] * memory.covariance(c) for c in range(memory.classes)) / n.sum()
    W = torch.linalg.solve(S, memory.means.T)
    return z.double() @ W - (memory.means.T * W).sum(0) / 2


def measured(stream: str, run: str, seed: int) -> dict[str, Any]:
    method, settings = RUNS[run]
    config = RunConfig(method=method, settings=settings, seed=seed, **STREAMS[stream])
    kept: list[Any] = []
    result = run_stream(config, learned=kept.append)
    row = {"stream": stream, "run": run, "seed": seed, "last": result.last, "pooled": None}
    if method.startswith("dmc"):
        learner, world, right = kept[0].method, prepared(config), []
        for test in world.stream.tests:
            for pixels, y in Loader(test, world.towers.prepare, world.towers.pixels, batch=256).ordered():
                with torch.no_grad():
                    z = learner.memory_rows(learner.embed(pixels))
                right.append(pooled_scores(z, learner.memory).argmax(1) == y)
        row["pooled"] = torch.cat(right).double().mean().item()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    found = []
    for stream in STREAMS:
        for run in RUNS:
            own = [row for row in rows if (row["stream"], row["run"]) == (stream, run)]
            if own:
                pooled = None if own[0]["pooled"] is None else estimate([row["pooled"] for row in own], 100)
                found.append([stream, run, estimate([row["last"] for row in own], 100), pooled])
    columns = [
        Column("stream"),
        Column("method"),
        Column("last %"),
        Column("last %, its Gaussians by discriminant analysis"),
    ]
    return Table(columns, found).markdown()


def main() -> None:
    args = arguments(__doc__, "results/heads.json", "docs/measured.md")
    jobs = ((stream, run, seed) for run, stream, seed in product(("lda", "dmc, tower frozen"), STREAMS, SEEDS))
    rows = measured_rows(args, ("stream", "run", "seed"), jobs, measured)
    write_block(args.into, "heads", table(rows))


if __name__ == "__main__":
    main()
