"""IncrementalClassifier: a classifier that is given new classes whenever there are any, in the manner of scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from cairn.classifier.choice import AUTO
from cairn.classifier.folder import StoredLearner, record_of, save_learner, undo
from cairn.classifier.inputs import (
    Labelled,
    Labels,
    Sentences,
    are_sets,
    columns,
    descriptions_of,
    list_of,
    pictures,
)
from cairn.classifier.intake import Intake, Loose, intake, loose, take_up, task_fingerprint
from cairn.classifier.label_set_learning import TAKEN_AS_SETS, IntakeOfSets, intake_of_sets
from cairn.classifier.learned import Learned
from cairn.classifier.learning import Learning
from cairn.classifier.mending import Mended, Mending
from cairn.classifier.novelty import Novelty
from cairn.classifier.predicting import Predicting
from cairn.classifier.record import KEEP, LearnerRecord
from cairn.classifier.retention import drawn_shares
from cairn.classifier.stored import copied
from cairn.config import with_values
from cairn.data.feature_store import FeatureStore
from cairn.data.in_memory import Item, items_of
from cairn.data.names import class_name
from cairn.data.task import Task
from cairn.data.templates import DEFAULT, prompt_templates
from cairn.errors import ConfigError, DataError, InvalidInput, TowersError, UnknownName, counted
from cairn.methods.catalogue import method_named
from cairn.methods.protocol import FROZEN, DescribedClasses, KeepsImages, Method
from cairn.storage.archive import Archive
from cairn.storage.locks import ReadWriteLock
from cairn.towers.cached import CachedTowers
from cairn.towers.feature_file import ROWS, row_towers, row_towers_named
from cairn.towers.preprocessing import asked_mode, decoded_side
from cairn.towers.protocol import Towers
from cairn.training.context import Checkpoint, Context, Log, Seeds
from cairn.types import State

WORK = "work"


class IncrementalClassifier(Predicting):
    """Learns classes as they come and keeps none of their images, unless the method says so (`Card.keeps`).

    `method` is a name of `cairn list`, or `auto`: `blend`, unless the images of the first call, left out of learning, tell that
    another in closed form does better (see `cairn.classifier.choice`); with `settings` always blend. `towers` is a hub id, a
    folder, `tiny`, a features file, `rows` for embeddings without any text, or a `Towers` object; `settings` are the method's,
    as `{"stage1.schedule.epochs": 4}`. `templates` are prompts with one `{}` for the class name. `descriptions` (for SPA) is a
    mapping of class names to sentences, or a file. `targets` says whether an image shows `one` class or may show several
    (`sets`), `auto` as the first labels are; see `cairn.classifier.label_sets`. The remaining arguments are as in `RunConfig`. The
    constructor stores them, as scikit-learn has it: nothing is loaded or checked before it is needed.

    After `fit` or `partial_fit`, not before: `chosen_`, the method's name, `classes_`, in order of arrival (columns of
    `predict_proba`), `counts_`, images learned per class, `history_`, what was learned when, `method_`, the method itself, and
    `notices_`, what it had to say.

    Predictions may be asked for from many threads; learning waits for them and they wait for it.
    """

    def __init__(
        self,
        method: str = AUTO,
        towers: str | os.PathLike[str] | Towers = "openai/clip-vit-base-patch16",
        *,
        settings: Mapping[str, Any] | None = None,
        templates: Sequence[str] | str = DEFAULT,
        descriptions: Sentences = None,
        seed: int = 1,
        device: str = "auto",
        precision: str = "float32",
        preprocess: Literal["crop", "squash"] | None = None,
        decode: Literal["whole", "reduced"] = "whole",
        revision: str | None = None,
        targets: Literal["auto", "one", "sets"] = "auto",
    ):
        self.method, self.towers, self.settings = method, towers, settings
        self.templates, self.descriptions, self.seed = templates, descriptions, seed
        self.device, self.precision, self.revision = device, precision, revision
        self.preprocess: Literal["crop", "squash"] | None = preprocess
        self.decode: Literal["whole", "reduced"] = decode
        self.targets: Literal["auto", "one", "sets"] = targets
        self._lock = ReadWriteLock()
        self._begin()

    def _begin(self) -> None:
        """Nothing learned, nothing loaded."""
        self._method: Method | None = None
        self._learned = Learned()
        self._chosen: str | None = None
        self._config: BaseModel | None = None
        """Method and settings that it was learned with: those given later are for another `fit`."""
        self._towers: Towers | None = None
        self._novelty: Novelty | None = None
        self._notices: list[str] = []
        self._forgot = False
        self._keep = KEEP

    def __repr__(self) -> str:
        asked = self._asked_towers
        towers = asked if isinstance(asked, str) else asked.name
        return f"IncrementalClassifier(method={self.method!r}, towers={towers!r}, classes={len(self._learned.classes)})"

    # learning

    def fit(self, images: Labelled, labels: Labels = None, **options: Any) -> IncrementalClassifier:
        """Forget everything, then `partial_fit`, whose options these are. If it fails, the classifier is as it was."""
        learner = type(self)(**self.get_params()).partial_fit(images, labels, **options)
        with self._lock.writing():
            self.__dict__.update(learner.__dict__ | {"_lock": self._lock})
        return self

    def partial_fit(
        self,
        images: Labelled,
        labels: Labels = None,
        *,
        unlabelled: Item | Iterable[Item] = (),
        log: Log | None = None,
        checkpoint: Checkpoint | None = None,
        archive: Archive | None = None,
        again: bool = False,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> IncrementalClassifier:
        """Learn images with their class names, as one task. New names are new classes; of known ones more is learned. Where images
        may show several classes, there is a list of names for each.

        One image with its class name may stand without a list; a data set that has labels itself, of Hugging Face, pandas or
        PyTorch, needs none beside it (see `cairn.data.labelled_datasets`). Images that were learned as the same class already are left
        out, and a notice counts them, unless `again` is true: they are known by a hash of their pixels (see
        `cairn.data.identity`). If all were, nothing changes.
        `unlabelled` are images of the same classes of which nobody has said which: they are learned from too, by methods that cannot
        by themselves (`LearnsUnlabelled`) as what a first learner takes them for (see `cairn.classifier.self_training`). Those that
        are known with a label are left out.
        Names are kept in Unicode form NFC, without spaces at their ends. All files are read once before anything is learned;
        with `on_bad_image="skip"` those that cannot be read are left out, with a notice. If anything fails, the classifier is
        as it was. With `archive`, unfinished work is kept there whenever `checkpoint` finds it due, and the same call goes on
        with it.
        Raises UnreadableImages, a DataError; DataError for labels that are no text, ConfigError for unknown settings.
        """
        with self._lock.writing():
            if self.towers == ROWS and self._method is None:
                self._towers = row_towers(columns(images))
            log = self._noting(log or Log())
            labels = list_of(labels)
            take = intake_of_sets if self._has_sets(labels, log) else intake
            given = take(images, labels, self._learned, self._width, again, on_bad_image, log)
            hidden = self._without_labels(unlabelled, given, on_bad_image, log)
            if given.hashes:
                side = decoded_side(self.open_towers())
                self._learn(given.reduced(side), hidden.reduced(side), log, checkpoint or Checkpoint(), archive)
        return self

    def _without_labels(
        self,
        images: Item | Iterable[Item],
        given: Intake | IntakeOfSets,
        on_bad_image: Literal["stop", "skip"],
        log: Log,
    ) -> Loose:
        items = items_of(images, self._width)
        if items and isinstance(given, IntakeOfSets):
            raise InvalidInput(
                f"unlabelled: {counted(len(items), 'image')}; where images may show several classes all have labels, leave them out"
            )
        return loose(items, given.train_hashes, self._learned, self._width, on_bad_image, log)

    def _learn(
        self,
        given: Intake | IntakeOfSets,
        hidden: Loose,
        log: Log,
        checkpoint: Checkpoint,
        archive: Archive | None,
    ) -> None:
        learned, k = self._learned, len(self._learned.classes)
        task = Task(
            learned.tasks,
            range(k, k + len(given.new)),
            tuple(given.new),
            prompt_templates(self.templates),
            given.train,
            descriptions_of(self.descriptions),
            given.label_sets,
            hidden.hidden,
        )
        if archive is not None:
            settings = self._settings().model_dump(mode="json")
            take_up(
                checkpoint,
                archive,
                task_fingerprint(learned, settings, task, [*given.train_hashes, *hidden.hashes]),
                len(learned.history),
            )
        compares = self._method is None and self.method == AUTO and not self.settings
        learning = Learning(learned, self._method, self._copy, self._known_scores, compares)
        found = learning.learned_with(task, given, self._name, Context(Seeds(self.seed), log, checkpoint))
        self._config, self._novelty = found.method.config, None
        self._method, self._chosen, self._learned = found

    def _has_sets(self, labels: Any, log: Log) -> bool:
        """Whether images may show several classes: as they did before, or as `targets` says, or as the first labels are."""
        if self.targets not in ("auto", "one", "sets"):
            raise ConfigError(f"targets '{self.targets}': must be auto, one or sets")
        if self._method is not None:
            return self._learned.sets is not None
        if self.targets == "auto" and are_sets(labels):
            log("notice", text=TAKEN_AS_SETS)
        return self.targets == "sets" or (self.targets == "auto" and are_sets(labels))

    # changing what was learned

    def forget(self, name: str) -> IncrementalClassifier:
        """Without that class: its name, texts and statistics go. What shared weights learned of it stays. Raises DataError for
        a class that is not known."""
        with self._lock.writing():
            self._take(self._mending(Log()).forget(name))
            self._forgot = True
        return self

    def rename(self, name: str, new: str, *, log: Log | None = None) -> IncrementalClassifier:
        """Class `name` is called `new` from now on. Texts that the method made of the name are made anew, of the same templates
        and of the class's own descriptions; what was trained or fitted with the old text stays (see docs/your-images.md).

        Raises DataError for a class that is not known, for a name that another class has, and for one that no class may have.
        """
        with self._lock.writing():
            self._take(self._mending(self._noting(log or Log())).rename(name, new))
        return self

    def merge(self, name: str, other: str, into: str | None = None, *, log: Log | None = None) -> IncrementalClassifier:
        """Two classes become one, called `into`, by default `name`: as if the images of both had been learned under that name.
        It stands where the first of them stood. What was fitted to both of them stays (see docs/your-images.md).

        Raises ConfigError for a method that trains on images, DataError for a class that is not known or a name that a third has.
        """
        self._require_one_class(
            "merge", "one that shows both would count twice: forget one and learn its images as the other"
        )
        with self._lock.writing():
            self._take(self._mending(self._noting(log or Log())).merge(name, other, into))
        return self

    def unlearn(
        self,
        images: Item | Iterable[Item],
        labels: str | Iterable[str] | None = None,
        *,
        log: Log | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> IncrementalClassifier:
        """Take pictures that were learned out of the statistics again, as if they had never been learned; they can be learned
        anew. With `labels`, a class for each or one for all, only what was learned as that class is taken out.

        Pictures are known by a hash; those that were not learned are counted in a notice, and nothing is done about them. A class
        without any picture left is gone. What was fitted to them once stays (see docs/your-images.md).
        Raises ConfigError for a method that trains on images; UnreadableImages and DataError as `partial_fit` does.
        """
        with self._lock.writing():
            log = self._noting(log or Log())
            given, names = pictures(images, labels, self._width, on_bad_image, log)
            numbers = None if names is None else [self._learned.number(name) for name in names]
            found = self._mending(log).take_out(given, lambda row, c: numbers is None or c == numbers[row])
            if found is not None:
                self._take(found)
                self._forgot = True
        return self

    def relabel(
        self,
        images: Item | Iterable[Item],
        name: str | Sequence[str],
        *,
        log: Log | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> IncrementalClassifier:
        """These pictures are of class `name`, and of no other: `unlearn` as whatever else they were learned as and `partial_fit`
        as that, both or neither; where they may show several, of all in `name`. Pictures that were not learned before are learned,
        with a notice. Raises as these do."""
        with self._lock.writing(), self._all_or_nothing():
            noting, since, sets = self._noting(log or Log()), len(self._known().history), self._learned.sets is not None
            names = [class_name(own) for own in ([name] if isinstance(name, str) else name)]
            if not names or (len(names) > 1 and not sets):
                raise DataError(
                    f"{len(names)} names: images of this learner show {'some' if sets else 'one'} class each"
                )
            given, _ = pictures(images, None, self._width, on_bad_image, noting)
            kept = {c for own, c in self._learned.numbers().items() if own in names}
            if found := self._mending(noting).take_out(given, lambda _, c: c not in kept, " as another class"):
                self._take(found)
            self.partial_fit(given.items, [names] * len(given) if sets else names * len(given), log=log)
            if len(self._learned.history) > since:
                self._learned = self._learned.relabelled(since)
        return self

    def _mending(self, log: Log) -> Mending:
        return Mending(self._name, self._copy, self._learned, self.descriptions, self.templates, log)

    def _take(self, mended: Mended) -> None:
        """In place of what was learned before."""
        self._method, learned, self.descriptions = mended
        estimate = learned.estimate.with_draws(drawn_shares(self._method, self.seed))
        self._learned = replace(learned, estimate=estimate)
        self._novelty = None

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If anything fails, the classifier is as it was."""
        before = {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_notices", "_towers")}
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    # on disk

    def _record(self) -> LearnerRecord:
        asked = self._asked_towers
        return record_of(
            self._name,
            self._fitted(),
            self._learned,
            self.open_towers(),
            seed=self.seed,
            templates=prompt_templates(self.templates),
            descriptions=descriptions_of(self.descriptions),
            preprocess=self.preprocess if isinstance(asked, str) else asked_mode(asked),
            keep=self._keep,
        )

    def save(self, folder: str | os.PathLike[str], keep: int | None = None) -> None:
        """Everything learned, in a folder that says what is in it: a manifest with SHA-256, tensors, and CARD.md for people.
        Whole or not at all: a learner that was there stays until this one is written and checked.

        The last `keep` states stay, so that `undo` goes back to each that was saved, one after the other; by default as many as
        were asked for last, at first 3. After something was forgotten or unlearned none of those before stays.
        Raises ConfigError for a method that keeps images, and for a `keep` below 1.
        """
        if keep is not None and keep < 1:
            raise ConfigError(f"keep {keep}: must be at least 1, the state that is saved")
        with self._lock.reading():
            self._keep = self._keep if keep is None else keep
            # After forgetting, the state before must not stay beside this one
            save_learner(Path(folder), self._record(), self._fitted(), self._learned, 1 if self._forgot else None)
            self._forgot = False

    @classmethod
    def undo(
        cls, folder: str | os.PathLike[str], towers: str | os.PathLike[str] | Towers | None = None, device: str = "auto"
    ) -> IncrementalClassifier:
        """The classifier of a folder as it was before it was saved there the last time; it is that in the folder, too, from now
        on. `towers` and `device` are as in `load`. Raises ResultError where no earlier state is kept."""
        undo(Path(folder))
        return cls.load(folder, towers, device)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        towers: str | os.PathLike[str] | Towers | None = None,
        device: str = "auto",
        store: FeatureStore | None = None,
    ) -> IncrementalClassifier:
        """The classifier that was saved there, by `save` or by a run with --keep-learner. `towers`, an object or where they are
        now, stand in for those it names, if they are the same. With `store` embeddings of images that it is asked for are kept
        there, so that an image that was seen before needs no pass of the tower.

        Raises ResultError for a folder that holds none, is damaged, or was learned on other weights than are found now, and
        ConfigError for a store where the method trains the image tower.
        """
        stored = StoredLearner.read(Path(folder))
        record, held = stored.record, stored.record.towers
        learner = cls(
            record.method,
            towers or held.name,
            templates=tuple(record.templates),
            descriptions=record.descriptions,
            seed=record.seed,
            device=device,
            precision=held.precision,
            preprocess=held.preprocess,
            decode=held.decode,
            revision=held.revision if towers in (None, held.name) else None,
        )
        learner._chosen = record.method
        learner._config, learner._learned, learner._notices = stored.config, stored.learned, list(stored.notices)
        learner.targets = "one" if record.label_sets is None else "sets"
        learner._keep = record.keep
        if learner.towers == ROWS:
            learner._towers = row_towers_named(held.fingerprint)
        try:
            stored.require_towers(learner.open_towers())
        except (TowersError, UnknownName, DataError) as error:
            if towers is not None:
                raise
            raise TowersError(
                f"{error}. The learner '{folder}' was learned on these: say where they are now with --towers, in Python with "
                "towers="
            ) from None
        learner._method = stored.restore(learner._fresh())
        if store is not None and learner.open_towers().has_images:
            if learner._method.encoder != FROZEN:
                raise ConfigError(f"'{folder}': {record.method} trains the image tower, so no embedding can be kept")
            learner._towers = CachedTowers(learner.open_towers(), store, str(folder))
            learner._method = stored.restore(learner._fresh())
        return learner

    # inside

    def _settings(self, method: str | None = None) -> BaseModel:
        """Those of the method that it was learned with, else of this one. Sentences that nobody gave are made of the templates."""
        if self._config is not None:
            return self._config
        entry = method_named(method or self._name)
        config = entry.default_config(self.open_towers())
        if DescribedClasses in entry.capabilities and self.descriptions is None:
            config = config.model_copy(update={"descriptions": "template"})
        return with_values(config, (self.settings or {}).items())

    def _noting(self, log: Log) -> Log:
        """The log, with notices and warnings kept in `notices_`."""

        def keep(event: dict[str, Any]) -> None:
            if event["event"] in ("notice", "warning"):
                self._notices.append(event["text"])
            log.keep(event)

        return Log(keep=keep, show=log.show)

    def _fresh(self, method: str | None = None, changed: Mapping[str, Any] | None = None) -> Method:
        name = self._chosen or method or self._name
        settings = with_values(self._settings(name), (changed or {}).items())
        return method_named(name).build(self.open_towers(), settings, seed=self.seed)

    def _copy(self, method: str | None = None, changed: Mapping[str, Any] | None = None) -> Method:
        """The method as it stands, apart from the one that predicts; where nothing was learned, this one with changed settings."""
        return self._fresh(method, changed) if self._method is None else copied(self._fresh, *self._state())

    def _state(self) -> tuple[State, Sequence[Task]]:
        """What the method has learned: its state, and the tasks of one that keeps images."""
        method = self._fitted()
        return method.state_dict(), method.tasks if isinstance(method, KeepsImages) else ()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and `pickle`: what the method has learned in place of the method."""
        with self._lock.reading():
            state = None if self._method is None else self._state()
            return self.__dict__ | {"_method": None, "_novelty": None, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        learned = state.pop("state")
        self.__dict__.update(state)
        if learned is not None:
            of_method, tasks = learned
            self._method = copied(self._fresh, of_method, tasks)

    def describe(self, sentences: Mapping[str, Sequence[str]]) -> None:
        """Sentences of classes, beside and in place of those given before."""
        given = descriptions_of(self.descriptions)
        own = {} if given is None else {name: list(said.sentences) for name, said in given.classes.items()}
        self.descriptions = {**own, **sentences}
