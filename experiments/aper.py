"""Whether APER's first session trains its adapter: how large it is in the end, and what it does to embeddings.

    python experiments/aper.py [--out results/aper.json] [--into docs/methods.md]
    python experiments/aper.py --table   # only write the table anew from what is stored

On the first ten classes of the photographs, a fifth of whose training images is kept apart. Sets are looked for under
`data/`, as `experiments/results.py` does.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from stored import arguments, measured_rows, write_block

from cairn.data.loading import Loader
from cairn.experiment.inputs import prepared
from cairn.experiment.schema import RunConfig
from cairn.maths.similarity import unit
from cairn.towers.tuning import Beside
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

STREAM = {"data": "data/cifar100", "towers": "data/mini-clip", "step": 10, "order": "seed:1993", "validation": 0.2}
RUNS = {
    "as published": (),
    "rate 0.1": ("schedule.lr=0.1",),
    "AdamW at 0.001": ("schedule.optimizer=adamw", "schedule.lr=1e-3"),
}
SEEDS = (1, 2, 3)


def measured(run: str, seed: int) -> dict[str, Any]:
    losses: list[float] = []
    config = RunConfig(method="aper", settings=RUNS[run], seed=seed, **STREAM)
    entry, stream, towers, settings = prepared(config)
    keep = Log(keep=lambda event: losses.append(event["loss"]) if event["event"] == "epoch" else None)
    method = entry.build(towers, settings, seed=seed)
    method.learn(stream.tasks[0], Context(Seeds(seed), keep))
    shares: list[torch.Tensor] = []

    def share(module: Beside, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        shares.append((module.added(inputs[0]).norm(dim=-1) / module.mlp(inputs[0]).norm(dim=-1)).flatten())

    for module in method.image.module.modules():
        if isinstance(module, Beside):
            module.register_forward_hook(share)
    d, means, likeness, right = towers.dim, method.means.means, [], []
    halves = {"original": slice(0, d), "adapted": slice(d, 2 * d), "both": slice(0, 2 * d)}
    with torch.no_grad():
        for pixels, y in Loader(stream.tests[0], towers.prepare, towers.pixels).ordered():
            x = method.embed(pixels).roll(d, 1)  # as the means have it
            likeness.append((unit(x[:, :d]) * unit(x[:, d:])).sum(1))
            found = [(unit(x[:, half]) @ unit(means[:, half]).T).argmax(1) == y for half in halves.values()]
            right.append(torch.stack(found, 1))
    told = torch.cat(right).double().mean(0).tolist()
    return {
        "run": run,
        "seed": seed,
        "split": stream.fingerprint,
        "towers": towers.fingerprint,
        "losses": losses,
        "added": torch.cat(shares).mean().item(),
        "cosine": torch.cat(likeness).mean().item(),
        "right": dict(zip(halves, told, strict=True)),
        "images": len(torch.cat(right)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation over seeds."""
    titles = (
        "optimisation",
        "loss, first epoch",
        "last",
        "added, % of the MLP",
        "cosine to the original",
        "right, %: original",
        "adapted",
        "both",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for run in RUNS:
        own = [row for row in rows if row["run"] == run]
        columns = [
            ([row["losses"][0] for row in own], 2),
            ([row["losses"][-1] for row in own], 2),
            ([100 * row["added"] for row in own], 2),
            ([row["cosine"] for row in own], 4),
            *(([100 * row["right"][half] for row in own], 1) for half in ("original", "adapted", "both")),
        ]
        if own:
            cells = [
                f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}" for values, digits in columns
            ]
            lines.append(f"| {run} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, "results/aper.json", "docs/methods.md")
    rows = measured_rows(args, ("run", "seed"), product(RUNS, SEEDS), measured)
    write_block(args.into, "aper", table(rows))


if __name__ == "__main__":
    main()
