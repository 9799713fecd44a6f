"""Search by optuna: trials are asked for, carried out as runs, and told. Its journal is kept in the sweep's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cairn.errors import ConfigError, ResultError
from cairn.experiment.schema import comparable_call
from cairn.storage.distribution import extra_remedy
from cairn.sweep.file import Choice, Range, SweepFile, option_or_setting, shown
from cairn.sweep.ledger import Job
from cairn.sweep.plan import Point, folder_name, point_with

JOURNAL = "search.journal"


class Trial(NamedTuple):
    number: int
    point: Point
    state: Literal["RUNNING", "COMPLETE", "FAIL"]
    value: float | None


def optuna_module() -> Any:
    """Raises ConfigError if optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(f"sweep: optuna is missing; {extra_remedy('ray')}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def require_held_out(points: list[Point]) -> None:
    """Raises ConfigError if trials would be measured on the test split."""
    for point in points:
        if not point.config.validation > 0:
            raise ConfigError(
                f"search with validation {point.config.validation:g}: it would choose by the test images; set validation = 0.2, "
                "the share of training images that is held out to choose by"
            )


def chosen(params: dict[str, Any]) -> Choice:
    return {key: value for path, param in params.items() for key, value in option_or_setting(path, param).items()}


class Study:
    """The search at one point of the grid. The metric is the mean over seeds, on images held out of training."""

    def __init__(self, folder: Path, file: SweepFile, point: Point):
        """Goes on with what `folder` holds of it. Raises ResultError if that was another search."""
        assert file.search is not None
        self._optuna, self._file, self.point, self.search = optuna_module(), file, point, file.search
        self._distributions = {key: self._distribution(one) for key, one in file.search.space.items()}
        self.going: dict[int, list[Job]] = {}
        """Runs of the trials that are to be told."""
        path, journal = folder / JOURNAL, self._optuna.storages.journal
        try:
            storage = journal.JournalStorage(journal.JournalFileBackend(str(path)))
            self._study = self._optuna.create_study(
                study_name=point.name, storage=storage, direction="maximize", load_if_exists=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ResultError(f"'{path}': cannot be continued ({error}); give another --out") from None
        run = comparable_call(point.config.model_dump(mode="json", exclude={"seed"}))
        search = file.search.model_dump(mode="json", exclude={"trials"})
        asked = json.loads(json.dumps({"run": run, "seeds": point.seeds, **search}))
        held = self._study.user_attrs.get("asked")
        if held is None:
            self._study.set_user_attr("asked", held := asked)
        held = {**held, "run": comparable_call(held["run"])}
        if changed := [key for key in asked if held.get(key) != asked[key]]:
            raise ResultError(
                f"'{path}': the search '{point.name}' was begun with another {changed[0]}; only trials may change, give another "
                "--out"
            )

    @property
    def left(self) -> int:
        """Trials that are still to be asked for."""
        return max(0, self.search.trials - len(self._study.get_trials(deepcopy=False)))

    def ask(self) -> Trial:
        """The next trial. Its sampler is seeded by its number: a search that was cut off asks for what it would have asked for."""
        number = len(self._study.get_trials(deepcopy=False))
        seed = int(np.random.SeedSequence([self.search.seed, number]).generate_state(1)[0])
        samplers = self._optuna.samplers
        random = self.search.sampler == "random"
        self._study.sampler = (
            samplers.RandomSampler(seed) if random else samplers.TPESampler(seed=seed, constant_liar=True)
        )
        return self._trial(self._study.ask(fixed_distributions=self._distributions), "RUNNING")

    def tell(self, number: int, value: float | None) -> None:
        """The metric of a trial; None if it failed."""
        self.going.pop(number, None)
        states = self._optuna.trial.TrialState
        self._study.tell(number, value, state=states.FAIL if value is None else states.COMPLETE)

    def trials(self) -> list[Trial]:
        """Those of earlier calls. One that was cut off while it was asked for is told as failed."""
        whole = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.params.keys() == self._distributions.keys():
                whole.append(self._trial(trial, trial.state.name, trial.value))
            elif not trial.state.is_finished():
                self.tell(trial.number, None)
        return whole

    def _trial(self, trial: Any, state: Any, value: float | None = None) -> Trial:
        choice = chosen({key: trial.params[key] for key in self._distributions})
        texts = {key: _short(text) for key, text in shown(choice).items()}
        first = ",".join([f"trial-{trial.number:03d}", *([texts["method"]] if "method" in texts else [])])
        name = f"{self.point.name}/{folder_name(first, texts)}"
        return Trial(trial.number, point_with(self._file, self.point.choice | choice, name), state, value)

    def _distribution(self, one: Range) -> Any:
        kinds = self._optuna.distributions
        if one.choices is not None:
            return kinds.CategoricalDistribution(one.choices)
        if isinstance(one.low, int) and isinstance(one.high, int):
            return kinds.IntDistribution(one.low, one.high, log=one.log)
        return kinds.FloatDistribution(float(one.low or 0), float(one.high or 0), log=one.log)


def _short(text: str) -> str:
    """A fraction with four digits."""
    try:
        return f"{float(text):.4g}" if "." in text or "e" in text else text
    except ValueError:
        return text
