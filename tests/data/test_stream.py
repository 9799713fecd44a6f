"""The class stream: which classes and images each task gets, and what is refused."""

import json

import numpy as np
import pytest

from cairn.data.images import Concatenation, Dataset, Subset, Unlabelled
from cairn.data.stream import class_order, held_out, long_tail, task_sizes, task_stream
from cairn.errors import ConfigError, DataError


class Sealed:
    """Images that must not be opened."""

    def __init__(self, labels, name="image"):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.name = name

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError(f"image {index} was opened")

    def describe(self, index):
        return f"{self.name}{index}"


def names(k):
    return tuple(f"c{i:03d}" for i in range(k))


def dataset(k=7, each_train=4, each_test=2, **changes):
    shuffled = np.random.default_rng(0).permutation(np.repeat(np.arange(k), each_train))
    values = {
        "name": "toy",
        "classes": names(k),
        "train": Sealed(shuffled, "train"),
        "test": Sealed(np.tile(np.arange(k), each_test), "test"),
        "templates": ("a {}.",),
    }
    return Dataset(**(values | changes))


# --- order ---


def test_seeded_order_is_the_fields():
    order = class_order("seed:1993", names(100))
    assert order[:10].tolist() == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert sorted(order.tolist()) == list(range(100))


def test_seeded_order_leaves_numpys_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    class_order("seed:1993", names(100))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_natural_order():
    assert class_order("natural", names(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", ["seed:", "seed:-1", "seed:1.5", "seed:x", "seed:²", f"seed:{2**32}"])
def test_seed_out_of_range(bad):
    with pytest.raises(ConfigError, match=rf"order '{bad}': the seed must be a whole number from 0 to 4294967295"):
        class_order(bad, names(4))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("order.json", '["c002", "c000", "c001"]'),
        ("order.yaml", "- c002\n- c000\n- c001\n"),
        ("order.yml", "[c002, c000, c001]"),
        ("order.txt", "c002\n\n  c000\nc001\n"),
        ("numbers.json", "[2, 0, 1]"),
        ("numbers.yaml", "- 2\n- 0\n- 1\n"),
        ("mapping.yaml", "class_order: [2, 0, 1]\n"),
        ("mapping.json", '{"class_order": ["c002", "c000", "c001"]}'),
    ],
)
def test_order_files(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert class_order(str(tmp_path / file), names(3)).tolist() == [2, 0, 1]


def test_order_file_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"order '.*nowhere\.json': neither natural, seed:N nor a file"):
        class_order(str(tmp_path / "nowhere.json"), names(3))


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        (["c000", "c001", "c002", "dog"], r"1 unknown class name: 'dog'"),
        (["c001"], r"2 missing class names: 'c000', 'c002'"),
        (["c000", "c001", "c002", "c001"], r"1 repeated class name: 'c001'"),
        ([0, 1, 3, -1], r"2 unknown class names: 'number 3', 'number -1'"),
        ([0, 1, 1], r"1 missing class name: 'c002'"),
        (["w", "x", "y", "z"], r"4 unknown class names: 'w', 'x', 'y' \.\.\."),
    ],
)
def test_order_file_that_does_not_match_the_classes(tmp_path, listed, problem):
    (tmp_path / "order.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=problem):
        class_order(str(tmp_path / "order.json"), names(3))


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("order.json", "[1, 2", "cannot be read"),
        ("order.yaml", "a: [", "cannot be read"),
        ("order.json", '{"c000": 1}', "must hold one list of class names"),
        ("order.yaml", "[1, c002, c000]", "must hold one list of class names"),
        ("order.yaml", "[true, false]", "must hold one list of class names"),
        ("order.yaml", "class_orders: [0, 1, 2]", "must hold one list of class names"),
    ],
)
def test_order_file_that_is_no_list(tmp_path, file, text, problem):
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        class_order(str(tmp_path / file), names(3))
    assert "\n" not in str(caught.value)


# --- sizes ---


@pytest.mark.parametrize(
    ("classes", "base", "step", "expected"),
    [
        (100, 0, 10, [10] * 10),
        (100, 50, 10, [50] + [10] * 5),
        (101, 0, 10, [10] * 10 + [1]),
        (7, 2, 3, [2, 3, 2]),
        (5, 5, 2, [5]),
        (5, 0, 5, [5]),
    ],
)
def test_sizes(classes, base, step, expected):
    assert task_sizes(classes, base, step) == expected


@pytest.mark.parametrize(
    ("base", "step", "problem"),
    [
        (0, 0, "step 0 and base 0: step must be at least 1, base at least 0"),
        (-1, 2, "step 2 and base -1: step must be at least 1, base at least 0"),
        (0, 6, "step 6 is larger than the number of classes, 5: take at most 5"),
        (6, 2, "base 6 is larger than the number of classes, 5: take at most 5"),
    ],
)
def test_sizes_out_of_range(base, step, problem):
    with pytest.raises(ConfigError, match=problem):
        task_sizes(5, base, step)


def test_smaller_last_task_is_reported():
    stream = task_stream(dataset(7), step=3)
    assert [len(task.classes) for task in stream.tasks] == [3, 3, 1]
    assert stream.notices == ("the last task has 1 of 3 classes: 7 classes do not divide evenly",)
    assert task_stream(dataset(6), step=3).notices == ()


# --- tasks ---


def test_tasks_hold_their_classes_in_order_of_arrival():
    data = dataset(7)
    stream = task_stream(data, base=3, step=2, order="seed:1993")
    arrival = np.random.RandomState(1993).permutation(7)
    assert stream.class_names == tuple(data.classes[i] for i in arrival)
    assert [task.classes for task in stream.tasks] == [range(3), range(3, 5), range(5, 7)]
    assert [task.index for task in stream.tasks] == [0, 1, 2]
    for task, test in zip(stream.tasks, stream.tests, strict=True):
        assert task.names == stream.class_names[task.classes.start : task.classes.stop]
        assert task.templates == data.templates
        for images, source in ((task.train, data.train), (test, data.test)):
            assert sorted(set(images.labels.tolist())) == list(task.classes)
            assert source.labels[images.indices].tolist() == [arrival[label] for label in images.labels]


def test_every_image_lands_in_one_task():
    data = dataset(7)
    stream = task_stream(data, step=2, order="seed:5")
    for parts, source in (([task.train for task in stream.tasks], data.train), (stream.tests, data.test)):
        together = np.concatenate([part.indices for part in parts])
        assert sorted(together.tolist()) == list(range(len(source)))


def test_limits_keep_the_first_of_each_class():
    data = dataset(5, each_train=4, each_test=3)
    stream = task_stream(data, step=2, limit_train=2, limit_test=1)
    for task in stream.tasks:
        assert np.bincount(task.train.labels)[list(task.classes)].tolist() == [2] * len(task.classes)
        for label in task.classes:
            first = np.flatnonzero(data.train.labels == label)[:2]
            assert task.train.indices[task.train.labels == label].tolist() == first.tolist()
    assert [len(test) for test in stream.tests] == [2, 2, 1]


@pytest.mark.parametrize("flag", ["limit_train", "limit_test"])
def test_limit_below_one(flag):
    with pytest.raises(ConfigError, match=rf"{flag.replace('_', '-')} 0: must be at least 1"):
        task_stream(dataset(), step=2, **{flag: 0})


def test_a_limit_above_all_images_is_none():
    data = dataset()
    huge = task_stream(data, step=2, limit_train=10**30, limit_test=2**63)
    assert huge.fingerprint == task_stream(data, step=2).fingerprint


# --- validation ---


def test_validation_comes_from_training_images_only():
    data = dataset(5, each_train=10)
    stream = task_stream(data, step=2, validation=0.3)
    train = np.concatenate([task.train.source.indices[task.train.indices] for task in stream.tasks])
    out = np.concatenate([test.source.indices[test.indices] for test in stream.tests])
    assert not set(train) & set(out)
    assert sorted([*train, *out]) == list(range(len(data.train)))
    assert all(test.source.source is data.train for test in stream.tests)
    assert np.bincount(data.train.labels[out]).tolist() == [3] * 5


def test_held_out_leaves_one_on_either_side():
    images = Sealed([0, 0, 1, 1, 1])
    for share in (0.01, 0.99):
        kept, out = held_out(images, share, seed=3)
        assert set(images.labels[kept]) == set(images.labels[out]) == {0, 1}
    assert np.array_equal(held_out(images, 0.5, seed=3)[1], held_out(images, 0.5, seed=3)[1])


def test_held_out_needs_two_images():
    with pytest.raises(DataError, match="class number 1 has one training image; it needs two"):
        held_out(Sealed([0, 0, 1]), 0.5, seed=0)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_validation_out_of_range(share):
    with pytest.raises(ConfigError, match=rf"validation {share}: must be at least 0 and below 1"):
        task_stream(dataset(), step=2, validation=share)


# --- long tail ---


def test_a_long_tail_falls_exponentially():
    counts = long_tail(100, 11, 100)
    expected = sorted((max(1, round(100 * 100 ** (-place / 10))) for place in range(11)), reverse=True)
    assert sorted(counts.tolist(), reverse=True) == expected
    assert (expected[0], expected[5], expected[-1]) == (100, 10, 1)
    assert counts.tolist() != expected  # rare classes come in every task
    assert long_tail(7, 1, 100).tolist() == [7]
    assert long_tail(3, 4, 1000).min() == 1


def test_imbalance_thins_training_images_alone():
    data = dataset(6, each_train=20, each_test=3)
    even, tailed = task_stream(data, step=2, order="seed:1"), task_stream(data, step=2, order="seed:1", imbalance=10)
    wanted = {data.classes[c]: n for c, n in enumerate(long_tail(20, 6, 10))}
    for task, whole in zip(tailed.tasks, even.tasks, strict=True):
        for label, name in zip(task.classes, task.names, strict=True):
            kept = task.train.indices[task.train.labels == label].tolist()
            assert kept == whole.train.indices[whole.train.labels == label].tolist()[: wanted[name]]
            assert len(kept) == wanted[name]
    assert [test.indices.tolist() for test in tailed.tests] == [test.indices.tolist() for test in even.tests]


def test_no_class_has_more_images_than_there_are_or_than_the_limit():
    data = dataset(6, each_train=20)
    stream = task_stream(data, step=6, limit_train=8, imbalance=10)
    assert np.bincount(stream.tasks[0].train.labels).tolist() == long_tail(8, 6, 10).tolist()


@pytest.mark.parametrize("imbalance", [0.5, 0, -1, float("nan"), float("inf")])
def test_imbalance_out_of_range(imbalance):
    with pytest.raises(ConfigError, match=rf"imbalance {imbalance}: must be a number from 1, such as 100"):
        task_stream(dataset(), step=2, imbalance=imbalance)


# --- fingerprint ---


def test_fingerprint_names_the_split():
    base = task_stream(dataset(), step=2).fingerprint
    assert base == task_stream(dataset(), step=2).fingerprint
    assert len(base) == 16
    others = [
        task_stream(dataset(), step=3),
        task_stream(dataset(), step=2, order="seed:1"),
        task_stream(dataset(), step=2, limit_train=1),
        task_stream(dataset(), step=2, limit_test=1),
        task_stream(dataset(), step=2, validation=0.5),
        task_stream(dataset(), step=2, imbalance=3),
        task_stream(dataset(), step=2, blurry=0.4),
        task_stream(dataset(), step=2, chunk=3),
        task_stream(dataset(), step=2, chunk=4),
        task_stream(dataset(), step=2, labelled=0.5),
        task_stream(dataset(), step=2, unlabelled=Unlabelled(dataset().test)),
        task_stream(dataset(each_train=5), step=2),
        task_stream(dataset(test=Sealed(np.tile(np.arange(7), 2), "elsewhere")), step=2),
    ]
    assert len({base, *(stream.fingerprint for stream in others)}) == len(others) + 1


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"classes": ()}, "data 'toy': no class found"),
        ({"classes": ("a", "b", "a")}, "class 'a' appears twice; names must differ"),
        ({"classes": ("a", "b")}, "train has label 2, but 2 classes"),
        ({"test": Sealed([0, 1])}, "class 'c002' has no test image; add some or remove the class"),
        ({"train": Sealed([0, 2])}, "class 'c001' has no train image; add some or remove the class"),
    ],
)
def test_data_sets_that_cannot_be_cut(changes, problem):
    with pytest.raises(DataError, match=problem):
        task_stream(dataset(3, **changes), step=1)


# --- views ---


def test_views_point_at_the_right_item():
    class Numbers(Sealed):
        def __getitem__(self, index):
            return self.name, index

    both = Concatenation([Numbers([0, 1, 2], "a"), Numbers([3, 4], "b")])
    assert len(both) == 5
    assert both.labels.tolist() == [0, 1, 2, 3, 4]
    assert [both[i] for i in (0, 2, 3, 4)] == [("a", 0), ("a", 2), ("b", 0), ("b", 1)]
    some = Subset(both, np.array([4, 1]), np.array([7, 8]))
    assert [some[0], some[1]] == [("b", 1), ("a", 1)]
    assert [some.describe(0), some.describe(1)] == ["b1", "a1"]
