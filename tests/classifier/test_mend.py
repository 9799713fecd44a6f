"""Mistakes are mended: what a learner is afterwards is what it would be had there been none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cairn import IncrementalClassifier
from cairn.classifier.folder import CARD, NAME, read_record
from cairn.classifier.intake import task_fingerprint
from cairn.data.in_memory import InMemoryImages
from cairn.data.stream import Task
from cairn.errors import ConfigError, DataError, ResultError, TowersError
from cairn.storage.archive import Archive
from cairn.towers.features import FeatureTowers
from cairn.training.log import Log

D = 12
NAMES = ("owl", "fox", "bear", "elk", "newt", "crow")
COUNTS = (9, 4, 6, 11, 3, 7)
QUICK = {
    "dmc": {"stage1.schedule.epochs": 2, "stage2.schedule.epochs": 2},
    "blend": {"features": 40},
    "acil": {"width": 40},
    "ranpac": {"width": 40},
}


@pytest.fixture(scope="module")
def towers():
    text = np.random.default_rng(0).normal(size=(len(NAMES), D)).astype("float32")
    return FeatureTowers(name="made", dim=D, logit_scale=20.0, fingerprint="made", names=NAMES, text=text)


def rows_of(*names, start=0, number=None):
    """Rows of classes, clustered around their texts and anisotropic, unequal in number: rows and a name for each."""
    x, y = [], []
    for name in names:
        c = NAMES.index(name)
        rng = np.random.default_rng(100 + c)
        spread = rng.normal(size=(D, D)) * np.linspace(1, 0.05, D)
        own = 3 * rng.normal(size=D) + rng.normal(size=(40, D)) @ spread
        own = own[start : start + (COUNTS[c] if number is None else number)]
        x.append(own.astype("float32"))
        y += [name] * len(own)
    return np.concatenate(x), y


def learner_of(method, towers, *tasks):
    """The learner of tasks, each the names of its classes or rows with names."""
    learner = IncrementalClassifier(method, towers, settings=QUICK.get(method))
    for task in tasks:
        learner.partial_fit(*(rows_of(*task) if isinstance(task[0], str) else task))
    return learner


def assert_same(one, other, *but):
    """Everything but the history and what `but` names of the record."""
    state, wanted = one.method_.state_dict(), other.method_.state_dict()
    assert state.keys() == wanted.keys()
    for key in state:
        assert torch.equal(state[key], wanted[key]), key
    mine, theirs = one._learned.to_record(), other._learned.to_record()
    for key in ("history", *but):
        del mine[key], theirs[key]
    assert mine == theirs
    hashes, known = (learner._learned.pictures.state_dict() for learner in (one, other))
    assert all(torch.equal(hashes[key], known[key]) for key in known)
    assert one.descriptions == other.descriptions


def kinds(learner):
    return [entry.get("change", "forgotten" if entry.get("forgotten") else "learned") for entry in learner.history_]


# undo


@pytest.mark.parametrize("method", ["blend", "dmc", "ranpac", "simplecil"])
def test_undone_is_never_seen_to_the_bit_also_when_learning_goes_on(method, towers, tmp_path):
    tasks = [("owl", "fox"), ("bear",), ("elk", "newt"), ("crow",)]
    learner, right = learner_of(method, towers, tasks[0], tasks[1]), learner_of(method, towers, tasks[0], tasks[1])
    learner.save(tmp_path)
    learner.partial_fit(*rows_of(*tasks[2]))
    learner.save(tmp_path)
    back = IncrementalClassifier.undo(tmp_path, towers)
    assert_same(back, right)
    assert kinds(back) == ["learned", "learned", "undone"]
    back.partial_fit(*rows_of(*tasks[3]))
    right.partial_fit(*rows_of(*tasks[3]))
    assert_same(back, right)
    x, _ = rows_of(*NAMES, start=20)
    np.testing.assert_array_equal(back.predict_proba(x), right.predict_proba(x))
    np.testing.assert_array_equal(back.known_score(x), right.known_score(x))


def test_undo_goes_back_one_save_after_the_other_as_far_as_states_are_kept(towers, tmp_path):
    learner, after = IncrementalClassifier("simplecil", towers), []
    for name in NAMES[:5]:
        learner.partial_fit(*rows_of(name))
        learner.save(tmp_path, *([4] if name == "owl" else []))
        after.append(list(learner.classes_))
    assert len(Archive(tmp_path, NAME).bytes_of_each()) == 4
    for number in (4, 3, 2):
        back = IncrementalClassifier.undo(tmp_path, towers)
        assert list(back.classes_) == after[number - 1] == list(IncrementalClassifier.load(tmp_path, towers).classes_)
        assert kinds(back) == ["learned"] * number + ["undone"]
        assert f"{number} classes" in (tmp_path / CARD).read_text()
    with pytest.raises(ResultError, match="no earlier state is there"):
        IncrementalClassifier.undo(tmp_path, towers)
    assert list(IncrementalClassifier.load(tmp_path, towers).classes_) == after[1]
    back.partial_fit(*rows_of("crow"))
    back.save(tmp_path)
    assert list(IncrementalClassifier.undo(tmp_path, towers).classes_) == after[1]
    assert read_record(tmp_path)[0].keep == 4


def test_a_state_that_was_saved_twice_is_one(towers, tmp_path):
    learner = learner_of("simplecil", towers, ("owl",))
    learner.save(tmp_path)
    learner.partial_fit(*rows_of("fox"))
    learner.save(tmp_path)
    learner.save(tmp_path)
    assert list(IncrementalClassifier.undo(tmp_path, towers).classes_) == ["owl"]


def test_what_was_forgotten_does_not_come_back(towers, tmp_path):
    learner = learner_of("simplecil", towers, ("owl", "fox"))
    learner.save(tmp_path)
    learner.forget("fox")
    learner.save(tmp_path)
    with pytest.raises(ResultError, match="forgot a class, and nothing of that is kept; learn its pictures again"):
        IncrementalClassifier.undo(tmp_path, towers)
    learner.partial_fit(*rows_of("bear"))
    learner.save(tmp_path)
    assert list(IncrementalClassifier.undo(tmp_path, towers).classes_) == ["owl"]
    with pytest.raises(ResultError, match="forgot a class"):
        IncrementalClassifier.undo(tmp_path, towers)


def test_keep_of_one_leaves_nothing_to_go_back_to(towers, tmp_path):
    learner = learner_of("simplecil", towers, ("owl",))
    with pytest.raises(ConfigError, match="keep 0: must be at least 1"):
        learner.save(tmp_path, keep=0)
    for name in ("fox", "bear"):
        learner.partial_fit(*rows_of(name))
        learner.save(tmp_path, keep=1)
    with pytest.raises(ResultError, match="no earlier state is there \\(1 of them is kept"):
        IncrementalClassifier.undo(tmp_path, towers)


def test_unfinished_work_is_taken_up_on_its_own_state_alone(towers):
    """Of the same task on a learner that was changed in between, it would be work on another one."""
    task = Task(2, range(2, 3), ("bear",), ("a {}.",), InMemoryImages([], np.zeros(0, int), D))
    names = []
    for change in (
        lambda _: None,
        lambda one: one.rename("fox", "crow"),
        lambda one: one.rename("fox", "crow").rename("crow", "fox"),
    ):
        learner = learner_of("simplecil", towers, ("owl", "fox"))
        change(learner)
        names.append(task_fingerprint(learner._learned, learner._settings().model_dump(mode="json"), task, []))
    assert len({*names}) == 3


# rename


@pytest.mark.parametrize("method", ["simplecil", "lda", "acil", "ranpac", "zero-shot"])
def test_renamed_is_never_called_otherwise(method, towers, tmp_path):
    """Where no name is trained with. What was fitted to scores of the old text, or counted of them, stays."""
    fitted = ["calibration", "estimate"] if method == "zero-shot" else []
    learner = learner_of(method, towers, ("owl", "fox"), ("bear",))
    x, y = rows_of("owl", "fox")
    right = learner_of(method, towers, (x, [name.replace("fox", "crow") for name in y]), ("bear",))
    assert learner.rename("fox", " crow ") is learner
    assert_same(learner, right, *fitted)
    assert kinds(learner) == ["learned", "learned", "renamed"]
    assert learner.history_[0]["new"] == ["owl", "crow"]
    learner.save(tmp_path)
    found = IncrementalClassifier.load(tmp_path, towers)
    assert list(found.classes_) == ["owl", "crow", "bear"]
    x, _ = rows_of(*NAMES[:3], start=20)
    assert found.predict(x).tolist() == right.predict(x).tolist()
    if not fitted:
        np.testing.assert_allclose(found.known_score(x), right.known_score(x))
    for one in (found, right):  # the old name is free again
        one.partial_fit(*rows_of("fox", start=9))
    assert_same(found, right, *fitted)


def test_of_a_renamed_class_blend_has_all_but_the_weights(towers):
    """The text is the new one's, the sums are untouched; what was fitted with the old text stays."""
    learner = learner_of("blend", towers, ("owl", "fox"), ("bear",))
    before = learner.method_.state_dict()
    x, y = rows_of("owl", "fox")
    right = learner_of(
        "blend", towers, (x, [name.replace("fox", "crow") for name in y]), ("bear",)
    ).method_.state_dict()
    state = learner.rename("fox", "crow").method_.state_dict()
    for key in state:
        fitted = key.startswith("pools")
        assert torch.equal(state[key], (before if fitted else right)[key]), key
    assert not torch.equal(state["texts"], before["texts"])


def test_a_forgotten_class_takes_all_of_its_names_with_it(towers, tmp_path):
    learner = learner_of("simplecil", towers, ("owl", "fox"))
    learner.rename("fox", "wolf").rename("wolf", "hyena")
    learner.forget("hyena")
    learner.save(tmp_path)
    for file in tmp_path.iterdir():
        for name in (b"fox", b"wolf", b"hyena"):
            assert name not in file.read_bytes()
    assert kinds(learner) == ["learned", "renamed", "renamed", "forgotten"]


def test_descriptions_go_with_the_class(towers):
    learner = IncrementalClassifier("simplecil", towers, descriptions={"fox": ["a bushy tail"], "owl": "large eyes"})
    learner.partial_fit(*rows_of("owl", "fox"))
    learner.rename("fox", "crow")
    assert learner.descriptions == {"crow": ["a bushy tail"], "owl": ["large eyes"]}


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("wolf", "crow", "class 'wolf' is not known"),
        ("fox", "owl", "class 'owl' is there already; merge 'fox' with it instead"),
        ("fox", "owl ", "class 'owl' is there already"),
        ("fox", "fox", "class 'fox' has that name already"),
        ("fox", " ", "at least one visible character"),
        ("fox", "a\nb", "control character"),
        ("fox", "\u202efox", "direction-changing"),
        ("fox", "zebra", "the features file has no text of class 'zebra'"),
    ],
)
def test_a_name_that_cannot_be_is_one_line_and_changes_nothing(old, new, error, towers):
    learner = learner_of("zero-shot", towers, ("owl", "fox"))
    right = learner_of("zero-shot", towers, ("owl", "fox"))
    with pytest.raises((DataError, TowersError), match=error) as caught:
        learner.rename(old, new)
    assert "\n" not in str(caught.value)
    assert_same(learner, right)
    assert learner.history_ == right.history_


def test_a_name_much_like_another_is_said(towers):
    learner = learner_of("simplecil", towers, ("owl", "fox"))
    learner.rename("fox", "OWL")
    assert any("names differ by case" in notice for notice in learner.notices_)


def test_a_name_in_another_form_is_found(towers):
    learner = learner_of("simplecil", towers, ("owl", "fox"))
    learner.rename("fox", "e\u0301lan")
    assert list(learner.classes_) == ["owl", "\u00e9lan"]
    learner.rename("e\u0301lan", "elan")
    assert list(learner.classes_) == ["owl", "elan"]


# unlearn, relabel, merge

SUMS = ["simplecil", "lda", "acil", "ranpac", "zero-shot", "blend"]


def near(one, other, x):
    """Whether two learners keep the same and answer alike; blend with the same weights, which stay as they were fitted."""
    if one.method == "blend":
        fitted = {k: v for k, v in one.method_.state_dict().items() if k.startswith(("pools", "ridge_errors"))}
        other.method_.load_state_dict({**other.method_.state_dict(), **fitted})
    assert list(one.classes_) == list(other.classes_)
    assert one.counts_.tolist() == other.counts_.tolist()
    hashes, known = (learner._learned.pictures.state_dict() for learner in (one, other))
    assert all(torch.equal(hashes[key], known[key]) for key in known)
    assert one.predict(x).tolist() == other.predict(x).tolist()


@pytest.mark.parametrize("method", SUMS)
def test_unlearned_pictures_were_never_learned_and_can_be_learned_anew(method, towers, tmp_path):
    x, y = rows_of("owl", "fox", "bear")
    learner = learner_of(method, towers, (x, y), ("elk",))
    learner.save(tmp_path)
    gone = [0, 3, 9, 12, 14]
    kept = np.setdiff1d(np.arange(len(x)), gone)
    right = learner_of(method, towers, (x[kept], [y[i] for i in kept]), ("elk",))
    stranger = rows_of("newt")[0][:1]
    assert learner.unlearn(np.concatenate([x[gone], stranger, x[gone[:1]]])) is learner
    assert "not learned: 1 of 7 images, row 5" in learner.notices_
    far, _ = rows_of("owl", "fox", "bear", "elk", start=20)
    near(learner, right, far)
    assert kinds(learner) == ["learned", "learned", "unlearned"]
    assert learner.history_[-1]["taken_out"] == 5
    learner.save(tmp_path)
    assert len(Archive(tmp_path, NAME).bytes_of_each()) == 1  # no state stays that knew them
    with pytest.raises(ResultError, match="took pictures out, and nothing of them is kept; learn them again"):
        IncrementalClassifier.undo(tmp_path, towers)
    found = IncrementalClassifier.load(tmp_path, towers).partial_fit(x[gone], [y[i] for i in gone])
    right = learner_of(method, towers, (x, y), ("elk",))
    near(found, right, far)
    before = found.history_
    assert found.unlearn(stranger).history_ == before  # nothing to take out, nothing done


def test_a_picture_that_was_learned_twice_is_taken_out_twice(towers):
    x, y = rows_of("owl", "fox")
    learner = learner_of("simplecil", towers, (x, y))
    learner.partial_fit(x[:2], y[:2], again=True).partial_fit(x[:1], ["fox"])
    assert learner.counts_.tolist() == [11, 5]
    learner.unlearn(x[:1], "owl")  # as fox it stays
    assert learner.counts_.tolist() == [9, 5]
    rows, names = np.concatenate([x[1:2], x[1:], x[:1]]), [y[1], *y[1:], "fox"]
    right = IncrementalClassifier("simplecil", towers).partial_fit(rows, names, again=True)
    torch.testing.assert_close(learner.method_.means.means, right.method_.means.means, rtol=0, atol=1e-5)
    learner.unlearn(x[:1])
    assert learner.counts_.tolist() == [9, 4]
    with pytest.raises(DataError, match="class 'wolf' is not known"):
        learner.unlearn(x[:1], "wolf")


def test_a_class_without_pictures_is_gone_with_its_name(towers, tmp_path):
    learner = IncrementalClassifier("lda", towers, descriptions={"fox": ["a bushy tail"]})
    learner.partial_fit(*rows_of("owl", "fox", "bear")).rename("fox", "wolf").unlearn(rows_of("fox")[0])
    assert list(learner.classes_) == ["owl", "bear"]
    assert learner.descriptions == {}
    learner.save(tmp_path)
    for file in tmp_path.iterdir():
        for name in (b"fox", b"wolf"):
            assert name not in file.read_bytes()
    right = learner_of("lda", towers, ("owl", "bear"))
    torch.testing.assert_close(learner.method_.memory.scatter, right.method_.memory.scatter, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", SUMS)
def test_relabelled_is_never_learned_as_anything_else(method, towers, tmp_path):
    """Also to a class that is new, and from one of which nothing is left."""
    x, y = rows_of("owl", "fox", "bear")
    wrong = [*range(2), *range(9, 13)]  # two owls, and all foxes
    learner = learner_of(method, towers, (x, y))
    learner.save(tmp_path)
    learner.relabel(x[wrong], "newt")
    assert kinds(learner) == ["learned", "relabelled"]
    assert learner.history_[-1]["taken_out"] == learner.history_[-1]["images"] == 6
    kept = np.setdiff1d(np.arange(len(x)), wrong)
    right = learner_of(method, towers, (x[kept], [y[i] for i in kept]), (x[wrong], ["newt"] * 6))
    far, _ = rows_of("owl", "bear", start=20)
    near(learner, right, far)
    learner.save(tmp_path)
    assert list(IncrementalClassifier.undo(tmp_path, towers).classes_) == ["owl", "fox", "bear"]


def test_relabelling_is_done_whole_or_not_at_all(towers, monkeypatch):
    x, y = rows_of("owl", "fox")
    learner, right = (learner_of("simplecil", towers, (x, y)) for _ in range(2))
    monkeypatch.setattr(IncrementalClassifier, "_learn", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        learner.relabel(x[:3], "fox")
    assert_same(learner, right)
    assert learner.history_ == right.history_
    monkeypatch.undo()
    learner.relabel(np.concatenate([x[:2], rows_of("newt")[0][:1]]), "fox")
    assert "not learned as another class: 1 of 3 images, row 2" in learner.notices_
    assert learner.counts_.tolist() == [7, 7]
    before = learner.history_
    learner.relabel(x[:2], "fox")  # they are
    assert learner.history_ == before


def test_a_notice_of_a_relabelling_is_said_once(towers):
    x, y = rows_of("owl", "fox")
    learner, events = learner_of("simplecil", towers, (x, y)), []
    learner.relabel(x[:1], "Owl", log=Log(keep=events.append))
    said = [event["text"] for event in events if event["event"] == "notice"]
    assert len(said) == len(set(said)) == 1
    assert learner.notices_ == said


@pytest.mark.parametrize("method", SUMS)
def test_merged_classes_were_learned_as_one(method, towers, tmp_path):
    learner = learner_of(method, towers, ("owl", "fox"), ("bear", "elk"))
    learner.save(tmp_path)
    x, y = rows_of("owl", "fox")
    again, names = rows_of("bear", "elk")
    right = learner_of(method, towers, (x, y), (again, [name.replace("bear", "fox") for name in names]))
    assert learner.merge("bear", "fox", into="fox") is learner
    near(learner, right, rows_of("owl", "fox", "elk", start=20)[0])
    assert learner.history_[1]["new"] == ["elk"]
    assert learner.history_[1]["again"] == ["fox"]
    assert learner.history_[2]["names"] == ["fox", "bear", "fox"]
    learner.save(tmp_path)
    assert list(IncrementalClassifier.undo(tmp_path, towers).classes_) == ["owl", "fox", "bear", "elk"]
    learner.merge("elk", "owl", into="newt")
    assert list(learner.classes_) == ["newt", "fox"]
    learner.save(tmp_path)
    if method in ("zero-shot", "blend"):
        state = IncrementalClassifier.load(tmp_path, towers).method_.state_dict()["texts"]
        torch.testing.assert_close(state, towers.class_texts(["newt", "fox"], []))


def test_what_was_learned_as_both_is_said_when_they_are_merged(towers):
    x, y = rows_of("owl", "fox")
    learner = learner_of("simplecil", towers, (x, y)).partial_fit(x[:2], ["fox", "fox"]).merge("owl", "fox")
    assert "learned as either class, now twice as one: 2 images" in learner.notices_
    assert learner.counts_.tolist() == [15]
    assert learner.unlearn(x[:2]).counts_.tolist() == [11]


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("dmc", QUICK["dmc"], "it trains on images"),
        ("lda", {"covariance": "low_rank"}, "low_rank keeps leading directions alone"),
        ("ranpac", {"width": 40, "tuning": "adapter", "schedule.epochs": 1}, "was trained on those of the first task"),
    ],
)
def test_where_it_cannot_be_done_it_is_refused_in_one_line(method, settings, reason, towers):
    x, y = rows_of("owl", "fox")
    learner = IncrementalClassifier(method, towers, settings=settings).partial_fit(x, y)
    state = {key: value.clone() for key, value in learner.method_.state_dict().items()}
    for change in (
        lambda: learner.unlearn(x[:2]),
        lambda: learner.relabel(x[:2], "fox"),
        lambda: learner.merge("owl", "fox"),
    ):
        with pytest.raises(ConfigError, match=f"{reason}.*undo the change that learned them, or forget the class"):
            change()
    assert all(torch.equal(value, state[key]) for key, value in learner.method_.state_dict().items())
    assert kinds(learner) == ["learned"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("owl", "owl"), "one class already"),
        (("owl", "wolf"), "class 'wolf' is not known"),
        (("owl", "fox", "bear"), "class 'bear' is there already; merge two of the three first"),
        (("owl", "fox", "a\nb"), "control character"),
    ],
)
def test_classes_that_cannot_be_merged(words, error, towers):
    learner, right = (learner_of("simplecil", towers, ("owl", "fox", "bear")) for _ in range(2))
    with pytest.raises(DataError, match=error):
        learner.merge(*words)
    assert_same(learner, right)


@pytest.mark.parametrize("method", ["lda", "ranpac", "blend"])  # under a large ridge, acil cannot tell
def test_rows_that_the_sums_do_not_hold_are_refused(method, towers):
    """As of a picture whose hash is known, on towers that make something else of it."""
    x, y = rows_of("owl", "fox", number=4)
    learner = learner_of(method, towers, (x, y))
    other = np.random.default_rng(3).normal(size=(3, D)).astype("float32")
    with pytest.raises(DataError, match=r"not learned"):
        learner._copy().unlearn(torch.from_numpy(50 * other), torch.zeros(3, dtype=torch.int64))
