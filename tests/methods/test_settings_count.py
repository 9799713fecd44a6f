"""Every documented setting of every method counts: another value changes scores, or what is kept."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from cairn.config import choices, settings, with_settings
from cairn.data.images import Dataset, Subset
from cairn.data.loading import Loader
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import task_stream
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import LearnsUnlabelled
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.seeds import Seeds

QUICK = {
    r"(.*\.)?schedule\.epochs": "2", r"(.*\.)?schedule\.batch": "4", r"(.*\.)?schedule\.lr": "0.01",
    r"(.*\.)?schedule\.weight_decay": "0.01", r"generator\.steps": "5", r"generator\.batch": "4", r"width": "64",
    r"stage2\.per_class": "6", r"exemplars": "2", r"local\.patches": "6", r"local\.best": "2", r"candidates": "2",
    r"stage1\.tuning\.average": "null", r"replayed": "2",
}  # fmt: skip
"""What keeps a run short, and lets each setting have room to count, by pattern of the path."""

OTHERS: dict[str, Any] = {
    r"(.*\.)?schedule\.epochs": 3,
    r"(.*\.)?schedule\.clip": 1e-3, r"(.*\.)?schedule\.warmup": 0.5, r"(.*\.)?schedule\.weight_decay": 0.9,
    r"real_share": 0.3, r"(.*\.)?real_share": 0.75, r"(.*\.)?average": 0.9, r"(.*\.)?targets": r".*vision_model.*fc1",
    r"(.*\.)?tuning\.layers": 1, r"(.*\.)?init": "a drawing of", r"condition_limit": 1.0001, r"descriptions": "template",
    r"replay": 3, r"prior": 3.0, r"noise": 2.0, r"lowest": 3, r"highest": -3, r"held_out": 0.9, r"drift\.lam": 10.0,
    r"stage1\.slow": 50.0, r"threshold": 0.0, r"margin": 0.9, r"probes": 2, r"(.*\.)?covariance\.rank": 2,
    r"drift\.rank": 2, r"stage2\.text\.(shared|task)": 2,
    r"local\.eps": 1.0, r"local\.iterations": 1, r"local\.patches": 3, r"local\.best": 1,
    r"subspace": 8, r"rank\.rank": 2, r"rank\.price": 30.0, r"rank\.share": 0.3,
    r"floor": 1.0, r"memory": "a features file", r"search\.lists": 2, r"neighbours": 3, r"fusion\.heads": 2, r"base": "simplecil",
    r"base_settings": '{"ridge": 5.0}',
    r"replayed": 3, r"sampled": 5, r"buffer": 8,
    r"graph\.neighbours": 1, r"candidates": 4, r"pairs": 1, r"(.*\.)?schedule\.milestones": "[1]", r"rank": 2,
}  # fmt: skip
"""Other values, where a number doubled, a flag turned, or another word of a list would not do."""

UNDER: dict[str, tuple[str, ...]] = {
    r"calfuse:temperature": ("distillation=1",),
    r"(blend|mccl):threshold": ("threshold=1",),
    r"ranpac:schedule\..*": ("tuning=adapter",),
    r"reco:base_settings": ("base=acil",),
    r"sda:insertion": ("buffer=8",),
    r"sda:tuning\..*": ("shifts=none",),
    r"reco:(floor|neighbours|alignment|exemplars)": ("compare=both",),
    r"rapf:(threshold|separation)": ("margin=0.9",),
    r"rapf:schedule\.cosine": ("schedule.milestones=[]",),
    r".*:stage2\.text\.(shared|task)": ("stage2.text.shared=1", "stage2.text.task=1", "stage2.text.init=null"),
    r".*:stage2\.text\.init": ("stage2.text.shared=4",),
    r".*:local\.(eps|iterations)": ("local.transport=true",),
}
"""What must hold for a setting to count, by pattern of method:path."""

IMAGES = (
    r"(.*\.)?tuning\.(rank|prompts_anchor|alpha|dropout|targets|lr|average|width|scale)|attention|local\..*|descriptions|views|ensemble|probes|patches"
    r"|shifts\.grid"
    r"|.*prompts.*"
)
"""Settings of an image tower or a text tower."""

IMAGE_KINDS = (
    r"=(layers|lora|full|projection|bottleneck|prompts|rotations)\b|^(stage1\.)?tuning=adapter$|^(stage2\.)?text=residual$"
    r"|^shifts=permutations$"
)
"""Choices that need one, and those which a features file makes by itself."""

ELSEWHERE = {
    ("ranpac", "search"): "how a ridge is found, not which: tests/methods/test_heads.py",
    ("reco", "search"): "faiss, which may be absent: tests/memory/test_retrieval.py",
    ("reco", "search.lists"): "the same",
    ("reco", "search.probes"): "the same",
    ("reco", "memory"): "a file: tests/methods/test_reco.py",
    ("capnet", "graph.share"): "few classes have no neighbours: tests/methods/test_capnet.py",
    ("capnet", "graph.neighbours"): "the same",
    ("capnet", "text.freeze_old"): "needs a graph that moves: tests/methods/test_capnet.py",
    ("segment", "ridge"): "scores of so few made embeddings are all certain: tests/methods/test_segment.py",
    ("segment", "threshold"): "the same",
    ("segment", "doubt"): "the same",
    ("mccl", "ratio"): "there are fewer unlabelled images than fill a batch: tests/methods/test_mccl.py",
    ("mccl", "noise"): "pictures have views of their own; of embeddings: tests/methods/test_mccl.py",
    ("joint", "stage1.classes"): "all images are those of the task, so the classes seen are those of the task",
    ("joint", "stage2.real_share"): "old images are kept, nothing is replayed",
    **{
        (method, "stage2.cuda_graph"): "how texts are computed, not which: tests/training/test_capture.py"
        for method in ("cgil", "dmc", "dmc-ot", "joint")
    },
}
"""Settings that cannot change scores, and why."""


ALIKE = r"(?!lda:).*\bcovariance=full|.*\bcovariance=auto (generator\.)?covariance\.rank=\d+"
"""Of few classes `auto`, the default but of lda, keeps full covariances, whatever its rank: tests/memory/test_gaussians.py."""


def matching(table: dict[str, Any], path: str, default: Any = None) -> Any:
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, path)), default)


def other(node: type[BaseModel], name: str, path: str, value: Any) -> Any:
    """Another value of a setting."""
    found = matching(OTHERS, path)
    if found is not None:
        return found
    annotation = node.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return next(word for word in get_args(annotation) if word != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return value / 2 or 0.5
    raise AssertionError(f"{path}: give another value than {value!r} in OTHERS")


def changes(method: str, config: BaseModel, prefix: str = "", under: tuple[str, ...] = ()):
    """(path, what must be set before, what is set) for every setting, those of all kinds of a choice too."""
    for name, field in type(config).model_fields.items():
        value, path = getattr(config, name), f"{prefix}{name}"
        if name == "kind":
            continue
        if isinstance(value, BaseModel):
            kinds = choices(field)
            for kind, model in kinds.items():
                if kind != value.kind:
                    yield path, under, f"{path}={kind}"
                yield from changes(
                    method, value if kind == value.kind else model(), f"{path}.", (*under, f"{path}={kind}")
                )
            if not kinds:
                yield from changes(method, value, f"{path}.", under)
        else:
            yield (
                path,
                (*under, *matching(UNDER, f"{method}:{path}", ())),
                f"{path}={other(type(config), name, path, value)}",
            )


def cases():
    for name, entry in METHODS.items():
        for path, under, change in changes(name, entry.config()):
            whole = " ".join((*under, change))
            if (name, path) not in ELSEWHERE and not re.fullmatch(ALIKE, f"{name}:{whole}"):
                image = re.fullmatch(IMAGES, path) or re.search(IMAGE_KINDS, whole)
                yield pytest.param(name, bool(image), under, change, id=f"{name}:{','.join((*under[:1], change))}")


def few(dataset: Dataset, counts) -> Dataset:
    """The first classes with so many training images each, and one test image."""

    def some(images, numbers):
        rows = np.concatenate([np.flatnonzero(images.labels == c)[:n] for c, n in enumerate(numbers)])
        return Subset(images, rows, images.labels[rows])

    train, test = some(dataset.train, counts), some(dataset.test, [1] * len(counts))
    return Dataset(
        dataset.name,
        dataset.classes[: len(counts)],
        train,
        test,
        dataset.templates,
        dataset.embeddings,
        dataset.descriptions,
    )


@cache
def drawn() -> Dataset:
    """Of the drawn world."""
    return few(shapes_dataset(), (2, 5, 3, 4))


@pytest.fixture
def run(towers, embedded_dataset):
    """Scores and state after two tasks under these settings."""

    def learned(name: str, image: bool, assignments: tuple[str, ...]) -> dict[str, torch.Tensor]:
        if (name, image, assignments) in _known:
            return _known[name, image, assignments]
        entry = METHODS[name]
        if image:
            held, data = towers, drawn()
        else:
            told, data = embedded_dataset.embeddings, few(embedded_dataset, (5, 11, 9, 6))
            held = FeatureTowers(
                name="made",
                dim=told.dim,
                logit_scale=told.logit_scale,
                fingerprint="made",
                names=data.classes,
                text=told.text[:4],
            )
        config = entry.default_config(held)

        def paths() -> set[str]:
            return {path for path, _, _ in settings(config)}

        kinds = [a for a in assignments if a.partition("=")[0] in paths() and _is_choice(config, a.partition("=")[0])]
        config = with_settings(config, kinds)
        config = with_settings(
            config, [f"{path}={value}" for path in sorted(paths()) if (value := matching(QUICK, path)) is not None]
        )
        config = with_settings(config, [a for a in assignments if a not in kinds])
        share = 0.5 if LearnsUnlabelled in entry.capabilities else 1.0
        method, stream = entry.build(held, config, seed=1), task_stream(data, step=2, labelled=share)
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
        with torch.no_grad():
            rows = [
                method.scores(method.embed(pixels))
                for test in stream.tests
                for pixels, _ in Loader(test, held.prepare, held.pixels)
            ]
        _known[name, image, assignments] = {"scores": torch.cat(rows)} | {
            key: value.clone() for key, value in method.state_dict().items()
        }
        return _known[name, image, assignments]

    return learned


_known: dict[tuple, dict[str, torch.Tensor]] = {}
"""What runs gave: many settings are held against the same one."""


def _is_choice(config: BaseModel, path: str) -> bool:
    node = config
    *parents, name = path.split(".")
    for parent in parents:
        node = getattr(node, parent)
    return bool(choices(type(node).model_fields[name]))


@pytest.mark.parametrize(("name", "image", "under", "change"), list(cases()))
def test_another_value_changes_scores_or_what_is_kept(run, name, image, under, change):
    plain, changed = run(name, image, under), run(name, image, (*under, change))
    same = plain.keys() == changed.keys() and all(torch.equal(plain[key], changed[key]) for key in plain)
    assert not same
