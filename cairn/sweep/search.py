"""A search by optuna: trials are asked for, carried out as runs, and told. What it knows is kept in the sweep's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cairn.errors import ConfigError, ResultError
from cairn.storage.distribution import extra_remedy
from cairn.sweep.file import SEARCHED, Choice, Range, Search, SweepFile, text_of
from cairn.sweep.plan import Point, folder_name, point_with

JOURNAL = "search.journal"


class Trial(NamedTuple):
    number: int
    point: Point


def optuna_module() -> Any:
    """Raises ConfigError if optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(f"sweep: optuna is missing; {extra_remedy('ray')}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def refused_on_test(points: list[Point]) -> None:
    """Raises ConfigError if trials would be measured on the test split."""
    for point in points:
        if not point.config.validation > 0:
            raise ConfigError(
                f"search with validation {point.config.validation:g}: it would choose by the test images; set validation = 0.2, "
                "the share of training images that is held out to choose by"
            )


def chosen(params: Mapping[str, Any]) -> Choice:
    options = {key: value for key, value in params.items() if key in SEARCHED}
    return Choice(options, {key: text_of(value) for key, value in params.items() if key not in SEARCHED})


class Study:
    """The search at one point of the grid. The metric is the mean over seeds, on images held out of training."""

    def __init__(self, folder: Path, file: SweepFile, point: Point):
        """Goes on with what `folder` holds of it. Raises ResultError if that was another search."""
        self._optuna = optuna = optuna_module()
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        self._file, self.point, self._search = file, point, file.search
        self._distributions = {key: _distribution(optuna, one) for key, one in self._search.space.items()}
        path = folder / JOURNAL
        try:
            storage = JournalStorage(JournalFileBackend(str(path)))
            self._study = optuna.create_study(
                study_name=point.name, storage=storage, direction="maximize", load_if_exists=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ResultError(f"'{path}': cannot be continued ({error}); give another --out") from None
        asked = json.loads(json.dumps(_asked(self._search, point)))
        held = self._study.user_attrs.get("asked")
        if held is None:
            self._study.set_user_attr("asked", asked)
        elif held != asked:
            key = next(key for key in asked if held.get(key) != asked[key])
            raise ResultError(
                f"'{path}': the search '{point.name}' was begun with another {key}; only trials may change, give another --out"
            )

    @property
    def left(self) -> int:
        """Trials that are still to be asked for."""
        return max(0, self._search.trials - len(self._study.get_trials(deepcopy=False)))

    def begun(self) -> list[Trial]:
        """Trials that were asked for and have not been told of."""
        RUNNING = self._optuna.trial.TrialState.RUNNING
        found = []
        for trial in self._study.get_trials(deepcopy=False, states=[RUNNING]):
            if trial.params.keys() == self._distributions.keys():
                found.append(self._trial(trial))
            else:  # cut off while it was asked for
                self.tell(trial.number, None)
        return found

    def ask(self) -> Trial | None:
        """The next trial; None if there were all that the file asks for.

        Its sampler is seeded by its number, so that a search which was cut off does not begin its random numbers anew.
        """
        if not self.left:
            return None
        number = len(self._study.get_trials(deepcopy=False))
        seed = int(np.random.SeedSequence([self._search.seed, number]).generate_state(1)[0])
        samplers = self._optuna.samplers
        kinds = {
            "tpe": lambda: samplers.TPESampler(seed=seed, constant_liar=True),
            "random": lambda: samplers.RandomSampler(seed),
        }
        self._study.sampler = kinds[self._search.sampler]()
        return self._trial(self._study.ask(fixed_distributions=self._distributions))

    def tell(self, number: int, value: float | None) -> None:
        """The metric of a trial; None if it failed."""
        state = self._optuna.trial.TrialState
        self._study.tell(number, value, state=state.FAIL if value is None else state.COMPLETE)

    def told(self) -> list[tuple[Trial, float]]:
        """Trials that ended well, with their metric."""
        COMPLETE = self._optuna.trial.TrialState.COMPLETE
        return [(self._trial(trial), trial.value) for trial in self._study.get_trials(False, states=[COMPLETE])]

    def failed(self) -> list[Trial]:
        FAIL = self._optuna.trial.TrialState.FAIL
        found = self._study.get_trials(deepcopy=False, states=[FAIL])
        return [self._trial(trial) for trial in found if trial.params.keys() == self._distributions.keys()]

    def _trial(self, trial: Any) -> Trial:
        choice = chosen({key: trial.params[key] for key in self._distributions})
        shown = {key: f"{float(text):.4g}" if _is_fraction(text) else text for key, text in choice.shown.items()}
        first = ",".join([f"trial-{trial.number:03d}", *([shown["method"]] if "method" in shown else [])])
        name = f"{self.point.name}/{folder_name(first, shown)}"
        return Trial(trial.number, point_with(self._file, (*self.point.choices, choice), name))


def _distribution(optuna: Any, one: Range) -> Any:
    kinds = optuna.distributions
    if one.choices is not None:
        return kinds.CategoricalDistribution(one.choices)
    if isinstance(one.low, int) and isinstance(one.high, int):
        return kinds.IntDistribution(one.low, one.high, log=one.log)
    return kinds.FloatDistribution(float(one.low), float(one.high), log=one.log)


def _asked(search: Search, point: Point) -> dict[str, Any]:
    """What makes trials comparable."""
    run = point.config.model_dump(mode="json", exclude={"seed"})
    return {"run": run, "seeds": list(point.seeds), **search.model_dump(mode="json", exclude={"trials"})}


def _is_fraction(text: str) -> bool:
    return any(sign in text for sign in ".e") and _is_number(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
