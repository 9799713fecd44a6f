"""Does a discriminative fit on top of blend's closed form pay?

    python experiments/refinement.py [--only STREAM] [--out results/refinement.json] [--into docs/blend.md]
    python experiments/refinement.py --table    # only write the table anew from what is stored

All classes of a stream are learned at once, which favours the fit: no class is left for later. To blend's scores, of each image as if
it had not been learned, a linear map is added,

    log p(c | x) = blend_c(x) + (W x)_c - log sum,    W = argmin mean log-loss + lam / 2 |W|^2,

starting from nothing, so that the closed form is the prior. lam is that of the least log-loss on fifths of the training images which W
has not seen; an infinite lam, which leaves blend as it is, is among them. The test split chooses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from stored import arguments, mean_cell, measured_rows, write_block
from streams import STREAMS
from torch import Tensor
from torch.nn.functional import cross_entropy

from cairn.data.loading import Loader
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.schema import RunConfig
from cairn.methods import blend
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context, Seeds

AMONG = ("shapes", "cifar100-50", "ucf101", "caltech51", "caltech51-1", "caltech51-4", "imagenet150")
SEEDS, FOLDS = (1, 2, 3), 5
PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.1)
"""Rows of x have length sqrt(d) here."""


def refined(scores: Tensor, x: Tensor, y: Tensor, lam: float) -> Tensor:
    """W (d x k) of the least penalised log-loss on these images."""
    W = torch.zeros(x.shape[1], scores.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(scores + x @ W, y) + lam / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return W.detach()


def unseen_loss(scores: Tensor, x: Tensor, y: Tensor, lam: float, seed: int) -> float:
    """Mean log-loss of images that W has not seen."""
    fold = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)) % FOLDS
    losses = []
    for out in (fold == i for i in range(FOLDS)):
        W = refined(scores[~out], x[~out], y[~out], lam)
        losses.append(cross_entropy(scores[out] + x[out] @ W, y[out], reduction="sum"))
    return float(torch.stack(losses).sum()) / len(y)


def rows_of_images(method: blend.Blend, images: Any) -> tuple[Tensor, Tensor]:
    loader = Loader(images, method.towers.prepare, method.towers.pixels)
    found = [(method.memory_rows(method.embed(pixels)), y) for pixels, y in loader.ordered()]
    x, y = (torch.cat(part) for part in zip(*found, strict=True))
    return x, y


def measured(stream: str, seed: int) -> dict[str, Any]:
    words = STREAMS[stream]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    limit = flags.get("--limit-train")
    dataset = open_dataset(flags["--data"])
    tasks = task_stream(dataset, step=len(dataset.classes), limit_train=None if limit is None else int(limit))
    config = RunConfig(method="blend", data=flags["--data"], towers=flags.get("--towers", "auto"), seed=seed)
    towers, task, ctx = towers_for(config, dataset), tasks.tasks[0], Context(Seeds(seed))
    entry = METHODS["blend"]
    method = entry.build(towers, entry.default_config(towers), seed=seed)
    assert isinstance(method, blend.Blend)
    texts = towers.class_texts(task.names, task.templates).cpu() if method.uses_text else None
    with torch.no_grad():
        (x, y), (v, labels) = (rows_of_images(method, images) for images in (task.train, tasks.tests[0]))
        method.learn_rows(x, y, texts, ctx)
        tested = method.row_scores(v)
    assert method.left_out is not None
    scores, y = method.left_out
    # The images that weights were fitted to are those whose scores were kept
    rows = torch.randperm(len(x), generator=ctx.seeds.generator("weights"))[: blend.MOST].sort().values
    x, scale = x[rows].double(), x.shape[1] ** 0.5
    x, v, scores, tested = x * scale, v.double() * scale, scores.double(), tested.double()
    before = float(cross_entropy(scores, y))
    losses = {lam: unseen_loss(scores, x, y, lam, seed) for lam in PENALTIES}
    lam = min(losses, key=lambda lam: losses[lam])
    after = tested + v @ refined(scores, x, y, lam) if losses[lam] < before else tested
    return {
        "stream": stream,
        "seed": seed,
        "split": tasks.fingerprint,
        "towers": towers.fingerprint,
        "images": len(y),
        "unseen_loss": {"blend": before, **{str(lam): loss for lam, loss in losses.items()}},
        "penalty": lam if losses[lam] < before else None,
        "accuracy": float((tested.argmax(1) == labels).double().mean()),
        "refined_accuracy": float((after.argmax(1) == labels).double().mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| stream | log-loss of unseen images: blend | the best refined | refined | accuracy: blend % | refined % | seeds |",
        "|---|---|---|---|---|---|---|",
    ]

    for stream in AMONG:
        own = [row for row in rows if row["stream"] == stream]
        if own:
            best = [min(loss for lam, loss in row["unseen_loss"].items() if lam != "blend") for row in own]
            lines.append(
                f"| {stream} | {mean_cell([row['unseen_loss']['blend'] for row in own], 3)} | {mean_cell(best, 3)} | "
                f"{sum(row['penalty'] is not None for row in own)} of {len(own)} | "
                f"{mean_cell([100 * row['accuracy'] for row in own], 2)} | "
                f"{mean_cell([100 * row['refined_accuracy'] for row in own], 2)} | "
                f"{', '.join(str(row['seed']) for row in own)} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, "results/refinement.json", "docs/blend.md")
    jobs = [(stream, seed) for stream in AMONG for seed in SEEDS]
    write_block(args.into, "refinement", table(measured_rows(args, ("stream", "seed"), jobs, measured)))


if __name__ == "__main__":
    main()
