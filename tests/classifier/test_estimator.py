"""scikit-learn's checks of an estimator, on a classifier of rows; those that are left out are listed with the reason."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import suppress
from unittest import SkipTest

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import check_is_fitted

from cairn import IncrementalClassifier
from cairn.errors import ConfigError, NotFitted, UnknownName
from cairn.towers.features import FeatureTowers

LEFT_OUT = {
    "check_fit_score_takes_y": "the second argument is called labels, not y",
    "check_estimators_unfitted": "NotFittedError is scikit-learn's, which is not imported; NotFitted has the same bases",
    "check_n_features_in_after_fitting": "rows of another width are refused, in other words than scikit-learn's",
    "check_classifiers_regression_target": "labels are texts: a number is refused before it can be found continuous",
    "check_supervised_y_no_nan": "labels are texts, and 'nan' is one",
    "check_supervised_y_2d": "labels are texts: a column of them is refused, not flattened with a warning",
    "check_requires_y_none": "labels=None is refused, in other words than scikit-learn's",
    "check_fit2d_predict1d": "a single row may stand without a list",
}
"""Why a check is not passed. Each is run and must fail, so that the list stays true."""

BY_PROCESSOR = {
    "check_methods_subset_invariance": "holds to 1e-6, not 1e-7: the last bits of a float32 product may depend on its batch",
}
"""Why a check is passed on some processors alone, at some times."""


class NumbersAsTexts(IncrementalClassifier):
    """The checks' labels are numbers, and their columns in the order of these: here a class is called by a text, and columns
    are in order of arrival. Nothing else is changed."""

    def __init__(self, method="simplecil", towers="rows", *, seed=1):
        super().__init__(method, towers, seed=seed)
        self._numbers = {}

    def partial_fit(self, images, labels, classes=None):
        if labels is None:
            return super().partial_fit(images, labels)
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim and len(images) == len(labels):
            order = np.argsort(labels.ravel(), kind="stable")
            images, labels = images[order], labels[order]
        super().partial_fit(images, list(map(str, labels.tolist())))
        self._numbers |= {str(label): label for label in np.ravel(labels).tolist()}
        return self

    def score(self, images, labels):
        return float(np.mean(self.predict(images) == np.asarray(labels)))

    @property
    def classes_(self):
        return np.array([self._numbers[text] for text in super().classes_])


def name_of(check):
    return check.func.__name__ + "".join(f"-{value}" for value in check.keywords.values())


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is no BaseEstimator, as that is scikit-learn's
    CHECKS = [check for _, check in estimator_checks_generator(NumbersAsTexts())]


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_check(check):
    if check.func.__name__ in LEFT_OUT:
        with pytest.raises(Exception):  # noqa: B017, PT011
            check(NumbersAsTexts())
        return
    if check.func.__name__ in BY_PROCESSOR:
        with suppress(AssertionError):
            check(NumbersAsTexts())
        return
    try:
        check(NumbersAsTexts())
    except SkipTest as skipped:
        pytest.skip(str(skipped))


@pytest.fixture
def rows():
    """Thirty rows of three classes that overlap, of unequal sizes."""
    labels = np.repeat(["ash", "elm", "oak"], (12, 7, 11))
    centres = np.repeat(np.random.default_rng(0).normal(size=(3, 5)), (12, 7, 11), axis=0)
    return (centres + 0.3 * np.random.default_rng(1).normal(size=(30, 5))).astype("float32"), labels


def test_the_constructor_stores_its_arguments_and_does_nothing_else():
    """Nothing is checked or loaded: none of these could be."""
    given = {
        "method": "no such method", "towers": "/no/such/folder", "settings": {"no such setting": 1}, "templates": "no place",
        "descriptions": "/no/such/file", "seed": -1, "device": "abacus", "precision": "int3", "preprocess": "fold",
        "revision": "none", "targets": "neither", "decode": "half",
    }  # fmt: skip
    learner = IncrementalClassifier(**given)
    assert learner.get_params() == given
    assert all(learner.get_params()[key] is value for key, value in given.items())
    assert "no such method" in repr(learner)
    twin = clone(learner)
    assert (twin.get_params(), repr(twin)) == (given, repr(learner))
    with pytest.raises(UnknownName, match=r"argument 'sede'.*seed"):
        learner.set_params(sede=2)
    assert learner.set_params(seed=2, method="dmc").get_params() == given | {"seed": 2, "method": "dmc"}


@pytest.mark.parametrize(
    "name", ["method_", "classes_", "counts_", "history_", "calibration_", "notices_", "n_features_in_"]
)
def test_nothing_learned_is_there_before_learning(name, rows):
    learner = IncrementalClassifier("simplecil", "rows")
    assert not hasattr(learner, name)
    with pytest.raises(NotFitted, match="call fit or partial_fit first"):
        getattr(learner, name)
    with pytest.raises(NotFittedError):
        check_is_fitted(learner)
    assert hasattr(learner.partial_fit(*rows), name)
    check_is_fitted(learner)


def test_the_error_before_learning_is_of_the_kinds_that_scikit_learns_is():
    assert issubclass(NotFitted, tuple(kind for kind in NotFittedError.__bases__))
    assert issubclass(NotFitted, ConfigError)
    with pytest.raises(NotFitted):
        IncrementalClassifier("simplecil", "rows").predict(np.zeros((1, 3)))


def test_fit_begins_anew_and_partial_fit_goes_on(rows):
    x, y = rows
    learner = IncrementalClassifier("simplecil", "rows")
    assert learner.fit(x[:19], y[:19]) is learner
    assert learner.partial_fit(x[19:], y[19:]) is learner
    assert (learner.classes_.tolist(), learner.counts_.tolist()) == (["ash", "elm", "oak"], [12, 7, 11])
    assert learner.n_features_in_ == 5
    learner.fit(x[19:, :3], y[19:])
    assert (learner.classes_.tolist(), learner.counts_.tolist(), learner.n_features_in_) == (["oak"], [11], 3)
    before = learner.predict_proba(x[:, :3])
    with pytest.raises(ValueError, match="one label for each"):
        learner.fit(x, y[:3])
    assert (learner.predict_proba(x[:, :3]) == before).all()


def test_arguments_count_from_the_next_fit_on(rows):
    x, y = rows
    learner = IncrementalClassifier("ranpac", "rows", settings={"width": 8}).fit(x[:19], y[:19])
    learner.set_params(settings={"width": 16})
    assert learner.partial_fit(x[19:], y[19:]).method_.config.width == 8
    assert learner.fit(x, y).method_.config.width == 16


def test_rows_need_no_towers_and_come_back_from_disk(rows, tmp_path):
    x, y = rows
    learner = IncrementalClassifier("simplecil", "rows").fit(x, y)
    assert learner.score(x, y) > 0.9
    learner.save(tmp_path)
    again = IncrementalClassifier.load(tmp_path)
    assert (again.towers, again.n_features_in_) == ("rows", 5)
    for twin in (again, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert (twin.predict_proba(x) == learner.predict_proba(x)).all()
    assert again.partial_fit(x[:2] + 9, ["yew"] * 2).classes_[-1] == "yew"
    given = FeatureTowers(name="made", dim=5, logit_scale=100.0, fingerprint="made", names=(), text=None)
    same = IncrementalClassifier("simplecil", given).fit(x, y)
    assert (same.predict_proba(x) == learner.predict_proba(x)).all()


def test_it_stands_in_a_cross_validation(rows):
    x, y = rows
    scores = cross_val_score(IncrementalClassifier("lda", "rows"), x, y, cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 0.8
