"""IncrementalClassifier: a classifier that is given new classes whenever there are any, in the manner of scikit-learn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel

from cairn.classifier.calibration import Calibration, LeftOut, rehearsed
from cairn.classifier.card import card
from cairn.classifier.novelty import Novelty, gaussians_of, require_threshold
from cairn.classifier.record import LearnerRecord
from cairn.config import with_values
from cairn.data.descriptions import Descriptions, read_descriptions, written_by
from cairn.data.folders import named_unreadable, unreadable
from cairn.data.identity import LearnedPictures
from cairn.data.in_memory import InMemoryImages, Item, items_of
from cairn.data.loading import Loader
from cairn.data.names import alike, class_name, normal_form
from cairn.data.stream import Task
from cairn.data.templates import DEFAULT, prompt_templates
from cairn.errors import (
    ConfigError,
    DataError,
    NotFinite,
    ResultError,
    TowersError,
    UnknownName,
    UnreadableImages,
    counted,
    one_line,
    suggestion,
)
from cairn.methods.catalogue import method_named
from cairn.methods.protocol import DescribedClasses, KeepsImages, Method, PatchReasons
from cairn.methods.stored import restore_checked
from cairn.storage.archive import Archive
from cairn.storage.files import atomic_write
from cairn.storage.locks import ReadWriteLock
from cairn.storage.schema import validated
from cairn.storage.tensors import first_not_finite
from cairn.storage.versions import versions
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.feature_file import is_features_file, open_features_towers
from cairn.towers.features import FeatureTowers
from cairn.towers.fingerprint import same_towers
from cairn.towers.protocol import Towers
from cairn.towers.state import State
from cairn.training.checkpoint import Checkpoint
from cairn.training.log import Log
from cairn.types import Scores

NAME, WORK, CARD = "learner", "work", "CARD.md"
BATCH = 64
"""Images scored at once."""

REFERENCES = 256


class IncrementalClassifier:
    """Learns classes as they come and keeps none of their images.

    `method` is a name of `cairn list`; `towers` a hub id, a folder, `tiny`, a features file, or a `Towers` object; `settings` are the
    method's, as `{"stage1.schedule.epochs": 4}`. `templates` are prompts with one `{}` for the class name. `descriptions`
    (for SPA) is a mapping of class names to sentences, or a file. The remaining arguments are as in `RunConfig`. Nothing is
    loaded before it is needed.

    After `partial_fit`: `classes_`, in order of arrival (columns of `predict_proba`), `counts_`, images learned per class,
    `history_`, what was learned when, `method_`, the method itself, and `notices_`, what it had to say.

    Predictions may be asked for from many threads; learning waits for them and they wait for it.
    """

    def __init__(
        self,
        method: str = "dmc-ot",
        towers: str | Towers = "openai/clip-vit-base-patch16",
        *,
        settings: Mapping[str, Any] | None = None,
        templates: Sequence[str] | str = DEFAULT,
        descriptions: Mapping[str, Sequence[str] | str] | str | Path | None = None,
        seed: int = 1,
        device: str = "auto",
        precision: str = "float32",
        preprocess: Literal["crop", "squash"] | None = None,
        revision: str | None = None,
    ):
        self.method, self.towers, self.settings = method, towers, settings
        self.templates, self.descriptions, self.seed = prompt_templates(templates), descriptions, seed
        self.device, self.precision, self.preprocess, self.revision = device, precision, preprocess, revision
        self._lock = ReadWriteLock()
        self._towers: Towers | None = None
        self._novelty: Novelty | None = None
        self.method_: Method | None = None
        self.classes_ = np.array([], dtype=object)
        self.counts_ = np.array([], dtype=np.int64)
        self.history_: list[dict[str, Any]] = []
        self.references_: list[float] = []
        self.referenced_among_: list[int] = []
        self.calibration_ = Calibration()
        self._forgot = False
        self._pictures = LearnedPictures()
        self.notices_: list[str] = []

    def __repr__(self) -> str:
        return f"IncrementalClassifier(method={self.method!r}, towers={self._towers_name()!r}, classes={len(self.classes_)})"

    # learning

    def partial_fit(
        self,
        images: Item | Iterable[Item],
        labels: str | Iterable[str],
        *,
        log: Log | None = None,
        checkpoint: Checkpoint | None = None,
        archive: Archive | None = None,
        again: bool = False,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> IncrementalClassifier:
        """Learn images with their class names, as one task. New names are new classes; of known ones more is learned.

        One image with its class name may stand without a list. Images that were learned as the same class already are left
        out, and a notice counts them, unless `again` is true: they are known by a hash of their pixels (see
        `cairn.data.identity`). If all were, nothing changes.
        Names are kept in Unicode form NFC, without spaces at their ends. All files are read once before anything is learned;
        with `on_bad_image="skip"` those that cannot be read are left out, with a notice. If anything fails, the classifier is
        as it was. With `archive`, unfinished work is kept there whenever `checkpoint` finds it due, and the same call goes on
        with it.
        Raises UnreadableImages, a DataError; DataError for labels that are no text, ConfigError for unknown settings.
        """
        items, names = self._labelled(images, labels)
        kept = {name: class_name(name) for name in dict.fromkeys(names)}
        names = [kept[name] for name in names]
        log = self._noting(log or Log())
        with self._lock.writing():
            known = self._numbers()
            new = [name for name in dict.fromkeys(names) if name not in known]
            known |= {name: len(self.classes_) + i for i, name in enumerate(new)}
            given = InMemoryImages(items, np.array([known[name] for name in names], dtype=np.int64), self._width)
            if bad := unreadable(given):
                named = named_unreadable(given, bad)
                if on_bad_image == "stop":
                    raise UnreadableImages(
                        f"{named}; replace them, or leave them out: on_bad_image='skip', on the command line --on-bad-image skip",
                        bad,
                    )
                rows = np.delete(np.arange(len(items)), list(bad))
                for name in new:
                    if known[name] not in given.labels[rows]:
                        raise UnreadableImages(f"class '{name}': {named}, among them all of this class", bad)
                log("notice", text=f"left out: {named}")
                given = given.taken(rows)
            for notice in alike([*map(str, self.classes_), *new], new):
                log("notice", text=notice)
            # Class by class, as a stream has them: the order of arrival within a task must not matter
            given = given.taken(np.argsort(given.labels, kind="stable"))
            hashes = given.content_hashes()
            found = self._pictures.compare(hashes, given.labels)
            for text in found.notices(given, [*self.classes_, *new], again):
                log("notice", text=text)
            if not again:
                given, hashes = given.taken(found.fresh), [hashes[row] for row in found.fresh]
            if len(given):
                self._learn(given, hashes, new, log, checkpoint or Checkpoint(), archive)
        return self

    def _labelled(self, images: Item | Iterable[Item], labels: str | Iterable[str]) -> tuple[list[Item], list[str]]:
        """Images and a label for each, at least one. A single image and a single label may stand without a list."""
        items = items_of(images, self._width)
        names = [labels] if isinstance(labels, str) else list(labels)
        if len(items) != len(names):
            raise DataError(
                f"{counted(len(items), 'image')} with {counted(len(names), 'label')}: give one label for each image"
            )
        if not items:
            raise DataError("no image given")
        for name in names:
            if not isinstance(name, str):
                raise DataError(f"label {name!r}: a class is called by a text, such as 'oak'")
        return items, names

    def _learn(
        self,
        given: InMemoryImages,
        hashes: list[bytes],
        new: list[str],
        log: Log,
        checkpoint: Checkpoint,
        archive: Archive | None,
    ) -> None:
        k = len(self.classes_)
        task = Task(len(self.history_), range(k, k + len(new)), tuple(new), self.templates, given, self._descriptions())
        method = self._copy(log)
        if archive is not None:
            _go_on(checkpoint, archive, self._fingerprint(task, hashes))
        method.learn(task, checkpoint)
        left_out = rehearsed(method, lambda: self._copy(Log()), task, self.seed, checkpoint)
        calibration, references = self.calibration_.with_images(left_out), self._references(left_out)
        self.references_ = [*self.references_, *references]
        self.referenced_among_ = [*self.referenced_among_, *[k + len(new)] * len(references)]
        self.method_, self._novelty, self.calibration_ = method, None, calibration
        self.classes_ = np.array([*self.classes_, *new], dtype=object)
        counts = np.bincount(given.labels, minlength=len(self.classes_))
        counts[:k] += self.counts_
        again = [str(self.classes_[c]) for c in np.unique(given.labels[given.labels < k])]
        self.counts_, self._pictures = counts, self._pictures.with_more(hashes, given.labels)
        self.history_.append(
            {
                "date": str(date.today()),
                "new": new,
                "again": again,
                "images": len(given),
                "hashed": True,
            }
        )

    def _references(self, left_out: LeftOut | None) -> list[float]:
        """What the known score is read against, at most REFERENCES values of a task: see `cairn.classifier.novelty`."""
        if left_out is None or left_out.rows is None or gaussians_of(left_out.method) is None:
            return []
        a = Novelty(left_out.method, self.seed).fit(left_out.rows)
        if len(a) > REFERENCES:
            a = torch.quantile(a, torch.linspace(0, 1, REFERENCES, dtype=a.dtype))
        return a.tolist()

    def _fingerprint(self, task: Task, hashes: Sequence[bytes]) -> str:
        """Names the task, its images by their hashes, and the state that it is learned on."""
        digest = hashlib.sha256(repr((task.index, task.names, list(self.classes_), self._config())).encode())
        for label, value in zip(task.train.labels, hashes, strict=True):
            digest.update(label.tobytes() + value)
        return digest.hexdigest()

    def forget(self, name: str) -> IncrementalClassifier:
        """Without that class: its name, texts and statistics go. What shared weights learned of it stays. Raises DataError for
        a class that is not known."""
        with self._lock.writing():
            c = self._number(name)
            name = str(self.classes_[c])
            method = self._copy(self._noting(Log()))
            method.forget(c)
            self.method_, self._novelty = method, None
            self.classes_, self.counts_ = np.delete(self.classes_, c), np.delete(self.counts_, c)
            self._pictures = self._pictures.without_class(c)
            if isinstance(self.descriptions, Mapping):
                self.descriptions = {other: said for other, said in self.descriptions.items() if other != name}
            for entry in self.history_:
                for key in ("new", "again"):
                    entry[key] = [other for other in entry.get(key, []) if other != name]
            self.history_.append({"date": str(date.today()), "new": [], "again": [], "images": 0, "forgotten": 1})
            self._forgot = True
        return self

    # predicting

    def predict(self, images: Item | Iterable[Item], unknown_below: float | None = None) -> np.ndarray:
        """The likeliest class of each image; of a single one, too, an array. With `unknown_below` in [0, 1], None where
        `known_score` is below it."""
        if unknown_below is not None:
            require_threshold(unknown_below, "unknown_below")
        with self._lock.reading():
            scores, known = self._scored(images, known=unknown_below is not None)
            found = self.classes_[scores.argmax(1).numpy()] if len(scores) else np.array([], dtype=object)
            if unknown_below is not None:
                found[known < unknown_below] = None
        return found

    def predict_proba(self, images: Item | Iterable[Item]) -> np.ndarray:
        """(n, k), columns in the order of `classes_`: softmax of the scores over a temperature, which is fitted on images that
        were left out of learning (see `cairn.classifier.calibration`), so that of images of known classes about as many are
        classified correctly as the largest probabilities say."""
        with self._lock.reading():
            return self._probabilities(self._scored(images)[0]).numpy()

    def predict_topk(self, images: Item | Iterable[Item], k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its k likeliest classes with their probabilities, the likeliest first."""
        if k < 1:
            raise ConfigError(f"k {k}: must be at least 1")
        with self._lock.reading():
            p = self._probabilities(self._scored(images)[0])
            best = p.topk(min(k, p.shape[1]), 1)
            return [
                [(str(self.classes_[c]), value) for c, value in zip(row, values, strict=True)]
                for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]

    def known_score(self, images: Item | Iterable[Item]) -> np.ndarray:
        """How well each image fits the classes that are known, (n,) in [0, 1]; see `cairn.classifier.novelty`.

        Of a method that keeps Gaussians: the share of learned images that, left out of the statistics, fitted no better. So
        about `t` of the images of known classes fall below `t`, if they are like those that were learned. Of other methods:
        the largest probability, which promises nothing of the kind.
        """
        with self._lock.reading():
            return self._scored(images, known=True)[1]

    def score(self, images: Item | Iterable[Item], labels: str | Iterable[str]) -> float:
        """Share of images whose class is predicted. Raises DataError unless there is a label, a text, for each image."""
        items, names = self._labelled(images, labels)
        found = [normal_form(name) for name in self.predict(items)]
        return float(np.mean([name == normal_form(label) for name, label in zip(found, names, strict=True)]))

    def explain(self, image: Item, best: int = 3) -> list[dict[str, Any]]:
        """Why an image looks like its likeliest classes: per class `name`, `score`, `probability`, and of SPA which patches
        speak for it and for which sentence (`patches`, see `SPA.reasons`)."""
        items = items_of(image, self._width)
        if len(items) != 1:
            raise DataError(f"{len(items)} images: explain takes one at a time")
        with self._lock.reading():
            pixels = self._pixels(items[0])
            scores = self._scores_of(pixels)[0]
            p = self._probabilities(scores[None])[0]
            if isinstance(self.method_, PatchReasons) and self.method_.has_reasons:
                found = self.method_.reasons(pixels, best)
            else:
                top = scores.topk(min(best, len(scores))).indices.tolist()
                found = [{"class": c, "score": scores[c].item()} for c in top]
            for reason in found:
                reason |= {"name": str(self.classes_[reason["class"]]), "probability": p[reason["class"]].item()}
        return found

    def _pixels(self, image: Item) -> torch.Tensor:
        towers = self._fitted().towers
        return towers.pixels(towers.prepare(InMemoryImages([image], np.zeros(1, dtype=np.int64), self._width)[0])[None])

    @torch.no_grad()
    def _scores_of(self, pixels: torch.Tensor) -> Scores:
        method = self._fitted()
        return _finite(method.scores(method.embed(pixels)).cpu(), lambda row: "the image")

    def _probabilities(self, scores: Scores) -> Scores:
        return self.calibration_.log_probabilities(scores).exp()

    @torch.no_grad()
    def _scored(self, images: Item | Iterable[Item], known: bool = False) -> tuple[Scores, np.ndarray]:
        """Scores of every image, and how well it fits what is known, if that is asked for."""
        method, items = self._fitted(), items_of(images, self._width)
        if known and self._novelty is None:
            self._novelty = Novelty(
                method, self.seed, self.references_, self.referenced_among_, calibration=self.calibration_
            )
        given = InMemoryImages(items, np.zeros(len(items), dtype=np.int64), self._width)
        towers, scores, fits = method.towers, [torch.zeros(0, len(self.classes_))], [np.zeros(0)]
        try:
            for pixels, _ in Loader(given, towers.prepare, towers.pixels, batch=BATCH, cache_bytes=0).ordered():
                features = method.embed(pixels)
                done = sum(map(len, scores))
                scores.append(_finite(method.scores(features).cpu(), lambda row, done=done: given.describe(done + row)))
                if known:
                    fits.append(self._novelty.known(features, scores[-1]))
        except DataError:
            # All of the files, not the first alone
            bad = {
                row: why for row, why in unreadable(given, whole=True).items() if isinstance(items[row], (str, Path))
            }
            if bad:
                raise UnreadableImages(f"{named_unreadable(given, bad)}; replace or leave them out", bad) from None
            raise
        return torch.cat(scores), np.concatenate(fits)

    # on disk

    def require_savable(self) -> None:
        """Raises ConfigError for a method that keeps images: `save` writes none."""
        if method_named(self.method).card.keeps == "images":
            raise ConfigError(
                f"method '{self.method}' keeps images, so it cannot be saved; take another of `cairn list`"
            )

    def save(self, folder: str | Path) -> None:
        """Everything learned, in a folder that says what is in it: a manifest with SHA-256, tensors, and CARD.md for people.
        Whole or not at all: a learner that was there stays until this one is written and checked."""
        with self._lock.reading():
            method = self._fitted()
            self.require_savable()
            # After forgetting, the state before must not stay beside this one
            keep = 1 if self._forgot else 2
            record = self._record()
            stored = record.model_dump(mode="json", exclude_unset=True)
            Archive(Path(folder), NAME).write(
                stored, {"method": method.state_dict(), "pictures": self._pictures.state_dict()}, keep
            )
            self._forgot = False
            with atomic_write(Path(folder) / CARD) as temporary:
                temporary.write_text(card(record), encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, towers: str | Towers | None = None, device: str = "auto"
    ) -> IncrementalClassifier:
        """The classifier that was saved there. `towers`, an object or where they are now, stand in for those it names, if they
        are the same.

        Raises ResultError for a folder that holds none, is damaged, or was learned on other weights than are found now.
        """
        folder = Path(folder)
        found = Archive(folder, NAME).read()
        if found is None:
            raise ResultError(f"'{folder}': no learner there; `cairn learn {folder} PICTURES` makes one")
        if not found.record:
            raise ResultError(f"'{folder}': kept by a run of an earlier version; run it again with --keep-learner")
        record = validated(LearnerRecord, found.record, f"'{folder}': record of the learner")
        learner = cls._described(record, f"'{folder}': settings of the learner", towers, device)
        learner.notices_ += [f"{damaged}; the one before it was taken" for damaged in found.damaged]
        try:
            held = learner._loaded_towers()
        except (TowersError, UnknownName, DataError) as error:
            if towers is not None:
                raise
            raise TowersError(
                f"{error}. The learner '{folder}' was learned on these: say where they are now with --towers, in Python with "
                "towers="
            ) from None
        if not same_towers(held.fingerprint, record.towers.fingerprint):
            raise ResultError(
                f"'{folder}': learned on towers {record.towers.fingerprint}, '{held.name}' is "
                f"{held.fingerprint} today; give the weights and the tokenizer that it was learned on"
            )
        method = learner._fresh(learner._noting(Log()))
        if "method" not in found.parts:
            raise ResultError(f"'{folder}': holds no state of a method; learn again")
        restore_checked(method, found.parts["method"], folder, len(learner.classes_))
        learner.method_ = method
        learner._take_pictures(found.parts.get("pictures"), folder)
        return learner

    @classmethod
    def of_run(
        cls, method: Method, name: str, tasks: Sequence[Task], towers: Towers, calibration: Calibration, *, seed: int,
        preprocess: Literal["crop", "squash"] | None,
    ) -> IncrementalClassifier:  # fmt: skip
        """The classifier that `method`, which is called `name`, has become by learning `tasks`, as if it had been given them
        one after another. Its images are not known one by one, and its known score is read against draws."""
        learner = cls(name, towers, templates=tasks[0].templates, seed=seed, preprocess=preprocess)
        learner.method_, learner._stored_config, learner.calibration_ = method, method.config, calibration
        learner.classes_ = np.array([name for task in tasks for name in task.names], dtype=object)
        labels = np.concatenate([task.train.labels for task in tasks])
        learner.counts_ = np.bincount(labels, minlength=len(learner.classes_))
        if (said := tasks[0].descriptions) is not None:
            learner.descriptions = {
                name: list(said.classes[name].sentences) for name in learner.classes_ if name in said.classes
            }
        today = str(date.today())
        learner.history_ = [
            {"date": today, "new": list(task.names), "again": [], "images": len(task.train), "hashed": False}
            for task in tasks
        ]
        return learner

    def _take_pictures(self, state: Mapping[str, torch.Tensor] | None, folder: Path) -> None:
        """The hashes of learned pictures, which learners of earlier versions do not have."""
        if state is not None:
            try:
                self._pictures = LearnedPictures.from_state(state, len(self.classes_))
            except ValueError as error:
                raise ResultError(
                    f"'{folder}': the hashes of pictures: {error}; restore the folder from a copy"
                ) from None
        if unknown := sum(entry["images"] for entry in self.history_ if not entry.get("hashed")):
            self.notices_.append(
                f"learned without hashes, by an earlier version or in a run: {counted(unknown, 'image')}, not known one by one; "
                "given again, they count twice"
            )

    @classmethod
    def _described(
        cls, record: LearnerRecord, where: str, towers: str | Towers | None, device: str
    ) -> IncrementalClassifier:
        """An untrained classifier with what a record says of it."""
        held = record.towers
        learner = cls(
            record.method, towers or held.name, settings=None, templates=tuple(record.templates),
            descriptions=record.descriptions, seed=record.seed, device=device, precision=held.precision,
            preprocess=held.preprocess, revision=held.revision if towers in (None, held.name) else None,
        )  # fmt: skip
        entry, made_by = method_named(record.method), record.versions.get("cairn")
        learner._stored_config = validated(entry.config, entry.completed(record.config), where, made_by)
        learner.classes_ = np.array(record.classes, dtype=object)
        learner.counts_ = np.array(record.counts, dtype=np.int64)
        learner.history_ = [entry.model_dump(mode="json", exclude_unset=True) for entry in record.history]
        learner.references_, learner.calibration_ = record.references, record.calibration
        learner.referenced_among_ = record.referenced_among or [len(record.classes)] * len(record.references)
        return learner

    def _record(self) -> LearnerRecord:
        method, towers = self._fitted(), self._loaded_towers()
        own = isinstance(towers, (ClipTowers, FeatureTowers))  # others are named by who made them
        spoken = self._descriptions()
        record = {
            "method": self.method, "config": self._config(), "seed": self.seed, "templates": list(self.templates),
            "descriptions": None if spoken is None else {n: list(d.sentences) for n, d in spoken.classes.items()},
            "towers": {"name": towers.source if own else towers.name, "fingerprint": towers.fingerprint,
                       "precision": towers.precision if own else self.precision,
                       "preprocess": self.preprocess, "revision": towers.revision},
            "classes": list(self.classes_), "counts": self.counts_.tolist(), "history": self.history_,
            "references": self.references_, "referenced_among": self.referenced_among_,
            "calibration": self.calibration_.model_dump(mode="json"),
            "memory_bytes": method.memory_bytes,
            "bytes": sum(value.nbytes for value in method.state_dict().values()), "versions": versions(),
            "picture_hashes": len(self._pictures),
        }  # fmt: skip
        return validated(LearnerRecord, record, "this learner")

    # inside

    _stored_config: BaseModel | None = None

    def _settings(self) -> BaseModel:
        """The method's configuration. Sentences that nobody gave are made of the templates."""
        entry, towers = method_named(self.method), self._loaded_towers()
        if self._stored_config is not None:
            return self._stored_config
        config = entry.default_config(towers)
        if DescribedClasses in entry.capabilities and self.descriptions is None:
            config = config.model_copy(update={"descriptions": "template"})
        return with_values(config, (self.settings or {}).items())

    def _config(self) -> dict[str, Any]:
        return self._settings().model_dump(mode="json")

    def _noting(self, log: Log) -> Log:
        """The log, with notices and warnings kept in `notices_`."""

        def keep(event: dict[str, Any]) -> None:
            if event["event"] in ("notice", "warning"):
                self.notices_.append(event["text"])
            log.keep(event)

        return Log(keep=keep, show=log.show)

    def _fresh(self, log: Log) -> Method:
        return method_named(self.method).build(self._loaded_towers(), self._settings(), seed=self.seed, log=log)

    def _copy(self, log: Log) -> Method:
        """The method as it stands, apart from the one that predicts."""
        return self._fresh(log) if self.method_ is None else self._restored(*self._learned(), log)

    def _learned(self) -> tuple[State, Sequence[Task]]:
        """What the method has learned: its state, and the tasks of one that keeps images."""
        return self.method_.state_dict(), self.method_.tasks if isinstance(self.method_, KeepsImages) else ()

    def _restored(self, state: State, tasks: Sequence[Task], log: Log) -> Method:
        method = self._fresh(log)
        method.load_state_dict(state)
        if isinstance(method, KeepsImages):
            method.attach_images(tasks)
        return method

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`: what the method has learned in place of the method, which has a log."""
        with self._lock.reading():
            learned = None if self.method_ is None else self._learned()
            return self.__dict__ | {"method_": None, "_novelty": None, "learned": learned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        learned = state.pop("learned")
        self.__dict__.update(state)
        if learned is not None:
            self.method_ = self._restored(*learned, self._noting(Log()))

    def _loaded_towers(self) -> Towers:
        if self._towers is None and isinstance(self.towers, str):
            if is_features_file(self.towers):
                self._towers = open_features_towers(self.towers)
            else:
                self._towers = load_towers(
                    self.towers, device=self.device, precision=self.precision, preprocess=self.preprocess,
                    revision=self.revision,
                )  # fmt: skip
            self.notices_ += self._towers.notices
        return self._towers or self.towers

    @property
    def _width(self) -> int | None:
        """How many numbers an item has, where embeddings are learned in place of images."""
        if isinstance(self.towers, str) and not is_features_file(self.towers):
            return None
        towers = self._loaded_towers()
        return None if towers.has_images else towers.dim

    def _towers_name(self) -> str:
        return self.towers if isinstance(self.towers, str) else self.towers.name

    def _descriptions(self) -> Descriptions | None:
        if self.descriptions is None:
            return None
        if isinstance(self.descriptions, (str, Path)):
            return read_descriptions(self.descriptions)
        return written_by("given", self.descriptions)

    def _fitted(self) -> Method:
        if self.method_ is None:
            raise ConfigError("nothing was learned yet: call partial_fit first, or load a learner")
        return self.method_

    def _number(self, name: str) -> int:
        numbers = self._numbers()
        found = numbers.get(name, numbers.get(normal_form(str(name))))
        if found is None:
            raise DataError(f"class '{name}' is not known; {suggestion(str(name), map(str, self.classes_))}")
        return found

    def _numbers(self) -> dict[str, int]:
        """The classes' numbers by name, and by its normal form: a learner made before names were normalised may hold others."""
        exact = {str(name): i for i, name in enumerate(self.classes_)}
        return {normal_form(name): i for name, i in exact.items()} | exact


def _finite(scores: Scores, describe: Callable[[int], str]) -> Scores:
    """The scores. Raises NotFinite naming an image of which one is not a number: no class is the answer then."""
    if (row := first_not_finite(scores)) is not None:
        raise NotFinite(f"{one_line(describe(row))}: scores that are not finite; the weights or the image hold NaN")
    return scores


def _go_on(checkpoint: Checkpoint, archive: Archive, fingerprint: str) -> None:
    """Take up the work on this very task that `archive` holds, if any, and keep what is due there."""
    held = archive.read() if archive else None
    work = held.parts if held is not None and held.record.get("task") == fingerprint else {}
    checkpoint.kept_by(lambda parts: archive.write({"task": fingerprint}, parts))
    checkpoint.begin(work)
