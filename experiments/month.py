"""A person's month: four weeks of pictures that grow, repeat, are damaged, mistaken and mended; estimates against the truth.

    python experiments/month.py [--only METHOD[/SEED]] [--out results/month.json] [--into docs/a-month.md]
    python experiments/month.py --table  # only write the tables anew from what is stored

Rows that are stored already are not made again. Pictures are those of `data/cifar100`, towers `data/mini-clip`. A seed draws classes,
how many pictures each has, and when they come. What is held out is the rest of the training pictures: learned by nobody, used for
nothing but the truth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from stored import arguments, measured_rows, write_block

from cairn.classifier.classifier import IncrementalClassifier
from cairn.classifier.estimate import Z
from cairn.data.feature_store import FeatureStore
from cairn.towers.catalogue import load_towers

PICTURES, TOWERS = Path("data/cifar100/train"), "data/mini-clip"
METHODS, SEEDS = ("blend",), range(1, 11)
NEW = (12, 8, 8, 0)
"""New classes in each week."""
LEAST, MOST = 30, 60
"""Pictures of a class, in all weeks together."""
WRONG, LATER, UNWANTED = 12, 10, 5
"""Pictures that come under a wrong name, that old classes get later, and that should not have been learned."""
WITHIN = 0.03

Pairs = list[tuple[Path, str]]


@dataclass
class Month:
    """What is at hand: pictures with their true classes by week, and those that are held out."""

    weeks: list[Pairs] = field(default_factory=list)
    held_out: Pairs = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    """Of a class that is not wanted."""

    @classmethod
    def drawn(cls, seed: int) -> Month:
        rng, month = np.random.default_rng(seed), cls(weeks=[[], [], [], []])
        folders = sorted(PICTURES.iterdir())
        order = [folders[i] for i in rng.permutation(len(folders))]
        classes, month.foreign = order[: sum(NEW)], sorted(order[sum(NEW)].iterdir())[:20]
        for folder, week in zip(classes, np.repeat(range(4), NEW), strict=True):
            files = [sorted(folder.iterdir())[i] for i in rng.permutation(len(list(folder.iterdir())))]
            n = int(rng.integers(LEAST, MOST + 1))
            month.held_out += [(file, folder.name) for file in files[n:]]
            later = LATER if week < 3 and rng.random() < 0.5 else 0
            month.weeks[week] += [(file, folder.name) for file in files[: n - later]]
            for file in files[n - later : n]:
                month.weeks[int(rng.integers(week + 1, 4))].append((file, folder.name))
        return month

    def of(self, week: int, name: str) -> list[Path]:
        return [file for file, own in self.weeks[week] if own == name]

    def classes(self, week: int) -> list[str]:
        """Those of which pictures come in this week, as they come."""
        return list(dict.fromkeys(name for _, name in self.weeks[week]))


def learn(learner: IncrementalClassifier, pairs: Pairs) -> None:
    files, names = zip(*pairs, strict=True)
    learner.partial_fit(list(files), list(names), on_bad_image="skip")


def measured(method: str, seed: int) -> dict[str, Any]:
    month, towers = Month.drawn(seed), load_towers(TOWERS, device="cpu")
    store = FeatureStore(Path(tempfile.gettempdir()) / "cairn-month", patches="float16")
    learner = IncrementalClassifier(method, towers, seed=seed)
    weeks = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "learner"
        damaged = Path(place) / "damaged.png"
        damaged.write_bytes(month.weeks[0][0][0].read_bytes()[:200])

        def looked_at(week: int) -> None:
            learner.save(folder)
            reader = IncrementalClassifier.load(folder, towers, store=store)
            known = set(learner.classes_)
            held_out = [(file, name) for file, name in month.held_out if name in known]
            truth = reader.evaluate(*map(list, zip(*held_out, strict=True))).class_mean_accuracy
            found = learner.estimate_
            weeks.append({
                "week": week, "classes": len(known), "pictures": int(learner.counts_.sum()), "held_out": len(held_out),
                "estimate": found.accuracy, "interval": found.interval, "truth": truth,
            })  # fmt: skip

        # Week 1, with a picture that cannot be read.
        learn(learner, [*month.weeks[0], (damaged, month.classes(0)[0])])
        looked_at(1)

        # Week 2: the folders of week 1 once more, grown.
        learn(learner, [*month.weeks[0], *month.weeks[1]])
        looked_at(2)

        # Week 3: some pictures lie in the wrong folder, which is noticed afterwards.
        right, wrong = month.classes(2)[-2:]
        mistaken = month.of(2, right)[:WRONG]
        learn(learner, [(file, wrong if file in mistaken else name) for file, name in month.weeks[2]])
        learner.relabel(mistaken, right)
        looked_at(3)

        # Week 4: a class comes under a second name and is merged, another is renamed, pictures that should not have been
        # learned are taken out, and a folder that nobody wanted is undone.
        first, second, third = month.classes(0)[:3]
        twice = [file for file, name in month.held_out if name == first][:LATER]
        month.held_out = [(file, name) for file, name in month.held_out if file not in twice]
        learn(learner, [*month.weeks[3], *((file, "another name") for file in twice)])
        learner.merge(first, "another name")
        learner.rename(second, "a better name")
        month.held_out = [(file, "a better name" if name == second else name) for file, name in month.held_out]
        unwanted = month.of(0, third)[:UNWANTED]
        learner.unlearn(unwanted)
        learner.save(folder)
        learn(learner, [(file, "junk") for file in month.foreign])
        learner.save(folder)
        learner = IncrementalClassifier.undo(folder, towers)
        looked_at(4)

    # One that never saw a mistake.
    called = {second: "a better name"}
    twin = IncrementalClassifier(method, towers, seed=seed)
    for week in range(4):
        pairs = [(file, called.get(name, name)) for file, name in month.weeks[week] if file not in unwanted]
        learn(twin, [*pairs, *([(file, first) for file in twice] if week == 3 else [])])
    files = [file for file, _ in month.held_out][::4]
    own, other = learner.predictions(files).probabilities, twin.predictions(files).probabilities
    order = [list(twin.classes_).index(name) for name in learner.classes_]
    other = other[:, order]
    return {
        "method": method, "seed": seed, "towers": towers.fingerprint, "weeks": weeks,
        "twin": {"pictures": len(files), "same_counts": learner.counts_.tolist() == twin.counts_[order].tolist(),
                 "agreement": float((own.argmax(1) == other.argmax(1)).double().mean()),
                 "probability": float((own - other).abs().max())},
    }  # fmt: skip


def rate(hits: int, n: int) -> str:
    """Hits of n with Wilson's interval, per cent."""
    a = hits / n
    middle, half = a + Z**2 / (2 * n), Z * sqrt(a * (1 - a) / n + Z**2 / (4 * n**2))
    low, high = (max(0.0, 100 * (middle + sign * half) / (1 + Z**2 / n)) for sign in (-1, 1))
    return f"{hits} of {n} ({low:.0f} to {high:.0f} %)"


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| method | week | classes | pictures | estimate % | truth % | difference | within 3 points | truth in the interval |",
        "|---" * 9 + "|",
    ]
    for method in METHODS:
        own = [row["weeks"] for row in rows if row["method"] == method]
        for week in (*range(4), None):
            if not own:
                continue
            some = [each for weeks in own for each in (weeks if week is None else [weeks[week]])]
            off = np.array([each["estimate"] - each["truth"] for each in some])
            inside = sum(each["interval"][0] <= each["truth"] <= each["interval"][1] for each in some)
            shown = [f"{np.mean([each[key] for each in some]):.0f}" for key in ("classes", "pictures")]
            shares = [f"{100 * np.mean([each[key] for each in some]):.1f}" for key in ("estimate", "truth")]
            cells = [*(shown if week is not None else ["", ""]), *shares]
            near = int((np.abs(off) <= WITHIN).sum())
            lines.append(
                f"| {method} | {'all' if week is None else week + 1} | {' | '.join(cells)} | {100 * off.mean():+.1f} ± "
                f"{100 * off.std(ddof=1):.1f} | {rate(near, len(some))} | {rate(inside, len(some))} |"
            )
    return "\n".join(lines)


def twin_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| method | months | pictures asked | the same class % | largest difference of a probability |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        if own := [row["twin"] for row in rows if row["method"] == method]:
            same = 100 * np.mean([twin["agreement"] for twin in own])
            asked, most = sum(twin["pictures"] for twin in own), max(twin["probability"] for twin in own)
            lines.append(f"| {method} | {len(own)} | {asked:,} | {same:.1f} | {most:.1g} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments(__doc__, "results/month.json", "docs/a-month.md")
    jobs = [(method, seed) for method in METHODS for seed in SEEDS]
    rows = measured_rows(args, ("method", "seed"), jobs, measured)
    write_block(args.into, "month", table(rows))
    write_block(args.into, "month-twin", twin_table(rows))


if __name__ == "__main__":
    main()
