"""What the fuzzer damages: files as cairn writes them, and for each what reads it and looks at what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cairn.classifier.classifier import IncrementalClassifier
from cairn.config import with_settings
from cairn.contrib.pycil import read_config
from cairn.data.descriptions import read_descriptions, written_by
from cairn.data.embeddings import features_dataset, save_features
from cairn.data.loading import Loader
from cairn.data.stream import class_order, task_stream
from cairn.experiment.config_file import read_run_file
from cairn.experiment.folder import CALL, CHECKPOINT, RESULT, Call, read_call, read_learner, write_learner
from cairn.experiment.inputs import prepared
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS
from cairn.storage.archive import Archive
from cairn.storage.files import write_json
from cairn.towers.protocol import Towers
from cairn.training.checkpoint import Checkpoint

QUICK = ("stage1.schedule.epochs=1", "stage2.schedule.epochs=1")
LEARNERS = {
    "zero-shot": (),
    "simplecil": (),
    "dmc": QUICK,
    "dmc-ot": (*QUICK, "covariance=low_rank"),
    "finetune": QUICK[:1],
}

RUN_FILE = b'method = "dmc"\ndata = "shapes"\nstep = 5\nseeds = [1, 2]\n[settings]\nstage1.schedule.epochs = 2\n'
TOOLBOX = b'{\n"model_name": "simplecil",\n"dataset": "cifar224",\n"init_cls": 10,\n"increment": 10,\n"seed": [1993]\n}'

Files = dict[str, bytes]


class Wrong(Exception):
    """What was read is not what it must be."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


class Target(NamedTuple):
    """Files as they should be, and what reads them and looks at what came of it."""

    files: Files
    read: Callable[[Path], Any]


def targets(root: Path) -> dict[str, Target]:
    """Everything that is damaged, by name; `root` gets the one features file that runs were made with."""
    rng = np.random.default_rng(0)
    names = [f"class_{i}" for i in range(6)]
    text = rng.normal(size=(6, 8)).astype(np.float32)
    labels = np.repeat(np.arange(6), 4)
    rows = (text[labels] + 0.3 * rng.normal(size=(24, 8))).astype(np.float32)
    data = root / "data.safetensors"
    save_features(
        data,
        train_features=rows,
        train_labels=labels,
        test_features=rows[::2],
        test_labels=labels[::2],
        class_names=names,
        text_features=text,
        templates=["a {}."],
        logit_scale=20.0,
        model="made",
    )
    found = {}
    for name, changed in LEARNERS.items():
        config = RunConfig(method=name, data=str(data), step=2, settings=changed)
        folder = root / name
        result = run_stream(config, learned=partial(write_learner, folder))
        write_json(folder / RESULT, result.model_dump(mode="json"))
        found[f"learner {name}"] = Target(_files(folder), _learner)
        found[f"checkpoint {name}"] = Target(_files(_cut_off(config, root / f"{name}-cut")), _gone_on(config))
    towers = prepared(config).towers
    for name in ("simplecil", "dmc"):
        made = IncrementalClassifier(name, towers, settings=dict(text.split("=") for text in LEARNERS[name]))
        made.partial_fit(rows, [names[label] for label in labels]).save(root / f"classifier-{name}")
        found[f"classifier {name}"] = Target(_files(root / f"classifier-{name}"), _classifier(towers, rows))
    call = Call(
        run=RunConfig(method="dmc-ot", data=str(data), step=2, settings=LEARNERS["dmc-ot"]), checkpoint_seconds=60
    )
    said = written_by("me", {name: ("a bushy tail", f"the {name}'s ears") for name in names})
    lists = {"json": json.dumps(names), "yaml": "\n".join(f"- {name}" for name in names), "txt": "\n".join(names)}
    for kind, text in lists.items():
        found[f"order {kind}"] = Target({f"order.{kind}": text.encode()}, _order(f"order.{kind}", names))
    return found | {
        "features": Target({"x.safetensors": data.read_bytes()}, _features),
        "descriptions": Target({"d.json": as_json(said.model_dump(mode="json"))}, _descriptions),
        "run file": Target({"run.toml": RUN_FILE}, lambda folder: read_run_file(folder / "run.toml")),
        "toolbox": Target({"config.json": TOOLBOX}, lambda folder: read_config(folder / "config.json")),
        "call": Target({CALL: as_json(call.model_dump(mode="json"))}, _call),
        "settings": Target({"settings": b"dmc"}, _settings),
    }


def _files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _learner(folder: Path) -> None:
    result, learner = read_learner(folder)
    method = learner.method_
    stream = task_stream(features_dataset(result.run.data), step=2)
    pixels = next(iter(Loader(stream.tests[0], method.towers.prepare, method.towers.pixels)))[0]
    with torch.no_grad():
        scores = method.scores(method.embed(pixels))
    require(scores.shape == (len(pixels), len(result.class_order)), f"scores {tuple(scores.shape)}")
    require(bool(torch.isfinite(scores).all()), "scores that are not finite")


def _classifier(towers: Towers, rows: np.ndarray) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        loaded = IncrementalClassifier.load(folder, towers)
        p = loaded.predict_proba(rows[:3])
        require(p.shape == (3, len(loaded.classes_)) and bool(np.isfinite(p).all()), f"probabilities {p.shape}")

    return read


def _cut_off(config: RunConfig, folder: Path) -> Path:
    """A run that was stopped in its second task."""

    class Cut(BaseException): ...

    class Cutting(Checkpoint):
        def __init__(self) -> None:
            super().__init__(steps=1)
            self.begun = 0

        def begin(self, work: dict | None = None) -> None:
            super().begin(work)
            self.begun += 1

        def step(self, name: str, state: Callable) -> None:
            super().step(name, state)
            if self.begun == 2:
                raise Cut

    try:
        run_stream(config, checkpoint=Cutting(), archive=Archive(folder / CHECKPOINT, "run"))
    except Cut:
        pass
    else:  # a method without work of its own: between tasks
        archive = Archive(folder / CHECKPOINT, "run")
        archive.clear()
        checkpoint = Checkpoint(steps=10**9)
        run_stream(config, checkpoint=checkpoint, archive=archive)
        checkpoint.save()
    return folder


def _gone_on(config: RunConfig) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        result = run_stream(config, checkpoint=Checkpoint(), archive=Archive(folder / CHECKPOINT, "run"))
        require(len(result.accuracy) == 3 and all(0 <= a <= 1 for a in result.seen_accuracy), "accuracies")
        json.dumps(result.model_dump(mode="json"), allow_nan=False)

    return read


def _order(file: str, names: list[str]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        require(sorted(class_order(str(folder / file), names)) == list(range(6)), "no permutation")

    return read


def _features(folder: Path) -> None:
    data = features_dataset(folder / "x.safetensors")
    for part in (data.train, data.test):
        require(part.values.shape == (len(part.labels), data.embeddings.dim), f"rows {part.values.shape}")
        require(bool(np.isfinite(part.values).all()), "rows that are not finite")
        require(0 <= part.labels.min() <= part.labels.max() < len(data.classes), "labels")
    require(0 < data.embeddings.logit_scale < float("inf"), "scale")
    task_stream(data, step=1)


def _descriptions(folder: Path) -> None:
    found = read_descriptions(folder / "d.json")
    for sentences in found.of(found.classes):
        require(bool(sentences) and all(sentence.strip() for sentence in sentences), "no sentence")
    json.dumps(found.model_dump(mode="json"), ensure_ascii=False).encode()


def _call(folder: Path) -> None:
    call = read_call(folder)
    made = prepared(call.run)
    require(sum(len(task.classes) for task in made.stream.tasks) == len(made.stream.class_names), "tasks")
    json.dumps([call.model_dump(mode="json"), made.settings.model_dump(mode="json")], allow_nan=False).encode()


def _settings(folder: Path) -> None:
    method, *given = (folder / "settings").read_bytes().decode(errors="surrogateescape").split("\0\0")
    config = with_settings(METHODS[method].config(), given)
    dumped = config.model_dump(mode="json")
    json.dumps(dumped, allow_nan=False, ensure_ascii=False).encode()
    require(type(config).model_validate(dumped) == config, "settings that do not read back")
