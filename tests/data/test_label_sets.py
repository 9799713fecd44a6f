"""Images that show several classes: how they are cut into tasks, and where they are read from."""

import json

import numpy as np
import pytest
from PIL import Image

from cairn.data.attributes import KINDS, RATIO, attributes_dataset
from cairn.data.embeddings import save_features
from cairn.data.given_pictures import given_pictures
from cairn.data.images import Dataset, LabelSets
from cairn.data.label_set_tasks import held_out_sets
from cairn.data.opening import open_dataset
from cairn.data.stream import task_stream, without, without_class
from cairn.errors import ConfigError, DataError


class Sealed:
    """Images that must not be opened."""

    def __init__(self, n, name):
        self.labels, self.name = np.full(n, -1), name

    def __len__(self):
        return len(self.labels)

    def describe(self, index):
        return f"{self.name}{index}"


SHOWN = [[0], [1], [0, 2], [3], [1, 3], [2, 4], [0, 1, 4], [], [5], [3, 5]]
"""Classes of each image, of six."""


def sets(shown, name, k=6):
    targets = np.zeros((len(shown), k), dtype=bool)
    for row, classes in enumerate(shown):
        targets[row, classes] = True
    return LabelSets.of(Sealed(len(shown), name), targets)


def dataset(train=SHOWN, test=SHOWN, k=6):
    return Dataset("toy", tuple(f"c{i}" for i in range(k)), sets(train, "train", k), sets(test, "test", k), ("a {}.",))


def names_of(images):
    return [images.describe(i) for i in range(len(images))]


def test_two_columns_that_say_the_same_are_refused(tmp_path):
    """`learn` would take one of them and `run` the other."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,labels\n0.png,a,b;c\n")
    with pytest.raises(DataError, match=r"metadata.csv': columns label and labels; leave the one"):
        open_dataset(str(tmp_path))
    with pytest.raises(DataError, match=r"metadata.csv': columns label and labels; leave the one"):
        given_pictures(tmp_path)


# --- tasks ---


def test_a_task_has_the_images_that_show_its_classes_and_is_told_of_these_alone():
    stream = task_stream(dataset(), step=2)
    second = stream.tasks[1]
    assert names_of(second.label_sets) == ["train2", "train3", "train4", "train5", "train9"]
    assert second.label_sets.targets.tolist() == [
        [False, False, True, False],
        [False, False, False, True],
        [False, False, False, True],
        [False, False, True, False],
        [False, False, False, True],
    ]
    assert stream.label_sets
    assert not task_stream(dataset(), step=2).tasks[0].label_sets.targets[:, 2:].any()


def test_methods_that_learn_one_class_have_an_image_once_for_every_class_told():
    first = task_stream(dataset(), step=2).tasks[0]
    assert list(zip(names_of(first.train), first.train.labels.tolist(), strict=True)) == [
        ("train0", 0), ("train2", 0), ("train6", 0), ("train1", 1), ("train4", 1), ("train6", 1),
    ]  # fmt: skip


def test_tests_of_the_tasks_so_far_are_the_images_that_show_a_class_seen():
    stream = task_stream(dataset(), step=2)
    for i, task in enumerate(stream.tasks):
        seen = {name for test in stream.tests[: i + 1] for name in names_of(test)}
        assert seen == {f"test{row}" for row, shown in enumerate(SHOWN) if any(c < task.classes.stop for c in shown)}
    assert sum(map(len, stream.tests)) == 9  # the image that shows nothing is in none


def test_columns_follow_the_order_of_arrival():
    stream = task_stream(dataset(), step=3, order="seed:7")
    found = {}
    for test in stream.tests:
        for row in range(len(test)):
            found[test.describe(row)] = {stream.class_names[c] for c in test.targets[row].nonzero()[0]}
    assert found == {f"test{row}": {f"c{c}" for c in shown} for row, shown in enumerate(SHOWN) if shown}


def test_limits_keep_the_first_images_of_each_class():
    stream = task_stream(dataset(), step=6, limit_train=1)
    assert names_of(stream.tasks[0].label_sets) == ["train0", "train1", "train2", "train3", "train5", "train8"]


def test_a_share_of_training_images_stands_in_for_the_test_split():
    rng = np.random.default_rng(0)
    shown = [sorted(rng.choice(6, rng.integers(1, 4), replace=False)) for _ in range(300)]
    stream = task_stream(dataset(shown), step=3, validation=0.2)
    out = {name for test in stream.tests for name in names_of(test)}
    kept = {name for task in stream.tasks for name in names_of(task.label_sets)}
    assert not out & kept
    assert len(out | kept) == 300
    counts = sum(test.targets.sum(0) for test in stream.tests) / sets(shown, "").targets.sum(0)
    assert (abs(counts - 0.2) < 0.06).all()


def test_every_class_is_on_either_side_of_a_split():
    rng = np.random.default_rng(1)
    targets = rng.random((80, 20)) < 0.06
    targets[:40] |= np.eye(20, dtype=bool)[np.arange(40) % 20]
    images = LabelSets.of(Sealed(80, ""), targets)
    kept, out = held_out_sets(images, 0.2, [f"c{i}" for i in range(20)])
    assert targets[kept].any(0).all()
    assert targets[out].any(0).all()
    with pytest.raises(DataError, match=r"class 'c0'.*a split needs two"):
        held_out_sets(sets([[0], [1], [1]], "", 2), 0.2, ["c0", "c1"])


def test_the_fingerprint_tells_what_images_show():
    other = [*SHOWN[:-1], [3, 4, 5]]
    assert task_stream(dataset(), step=2).fingerprint == task_stream(dataset(), step=2).fingerprint
    assert task_stream(dataset(), step=2).fingerprint != task_stream(dataset(test=other), step=2).fingerprint
    assert task_stream(dataset(), step=2).fingerprint != task_stream(dataset(train=other), step=2).fingerprint


def test_images_left_out_are_gone_from_both_views():
    stream = task_stream(dataset(), step=2)
    first = [names_of(task.train) for task in stream.tasks]
    less = without(stream, [[i for i, name in enumerate(part) if name == "train6"] for part in first] + [[], [], []])
    assert "train6" not in names_of(less.tasks[0].label_sets) + names_of(less.tasks[0].train)
    assert less.fingerprint != stream.fingerprint
    rows = [[i for i, name in enumerate(part) if name in ("train8", "train9")] for part in first]
    with pytest.raises(DataError, match="class 'c5' loses all its training images"):
        without(stream, [*rows, [], [], []])


def test_a_task_without_a_class():
    second = task_stream(dataset(), step=2).tasks[1]
    less = without_class(second, 2)
    assert less.classes == range(2, 3)
    assert less.names == ("c3",)
    assert names_of(less.label_sets) == ["train3", "train4", "train9"]
    assert less.label_sets.targets.shape == (3, 3)
    assert less.train.labels.tolist() == [2, 2, 2]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="imbalance 10: data 'toy' has several classes in an image"):
        task_stream(dataset(), step=2, imbalance=10)
    with pytest.raises(DataError, match="class 'c6' has no train image"):
        task_stream(dataset(k=7), step=2)
    mixed = Dataset("toy", ("a", "b"), sets([[0], [1]], "", 2), Sealed(2, ""), ("a {}.",))
    with pytest.raises(DataError, match="one split may show several classes"):
        task_stream(mixed, step=2)


# --- where they come from ---


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def read(path):
    found = open_dataset(str(path))
    return {
        part: {
            images.describe(i): {found.classes[c] for c in images.targets[i].nonzero()[0]} for i in range(len(images))
        }
        for part, images in (("train", found.train), ("test", found.test))
    }


def test_a_csv_of_several_labels(tmp_path):
    for name in ("train/a.png", "train/b.png", "train/c.png", "test/d.png", "test/e.png"):
        picture(tmp_path / name)
    (tmp_path / "train/metadata.csv").write_text("file_name,labels\na.png,cat;dog\nb.png,\nc.png, dog ;cat;dog\n")
    (tmp_path / "test/metadata.csv").write_text("file_name,labels\nd.png,cat\ne.png,dog\n")
    assert read(tmp_path) == {
        "train": {"a.png": {"cat", "dog"}, "b.png": set(), "c.png": {"cat", "dog"}},
        "test": {"d.png": {"cat"}, "e.png": {"dog"}},
    }
    found = open_dataset(str(tmp_path))
    assert found.train[0].size == (8, 8)
    assert found.classes == ("cat", "dog")


def test_a_line_for_every_label(tmp_path):
    for name in ("train/a.png", "train/b.png", "val/d.png"):
        picture(tmp_path / name)
    (tmp_path / "train.csv").write_text("file_name,label\na.png,cat\na.png,dog\nb.png,dog\n")
    (tmp_path / "val.csv").write_text("file_name,label\nd.png,cat\nd.png,dog\n")
    assert read(tmp_path) == {"train": {"a.png": {"cat", "dog"}, "b.png": {"dog"}}, "test": {"d.png": {"cat", "dog"}}}


def test_a_csv_of_one_label_each_is_an_ordinary_data_set(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i}.png")
    lines = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(10))
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + lines)
    found = open_dataset(str(tmp_path))
    assert found.classes == ("cat", "dog")
    assert len(found.train) == 8
    assert len(found.test) == 2
    assert sorted(found.test.labels.tolist()) == [0, 1]


def coco(path, **changes):
    whole = {
        "info": {"year": 2026},
        "images": [{"id": 7, "file_name": "a.png", "width": 8}, {"id": 9, "file_name": "b.png"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 1.5, 1]},
            {"id": 2, "image_id": 7, "category_id": 3},
            {"id": 3, "image_id": 7, "category_id": 1},
            {"id": 4, "image_id": 9, "category_id": 1},
        ],
        "categories": [{"id": 3, "name": "zebra"}, {"id": 1, "name": "person"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole | changes))


def test_cocos_form_in_its_own_layout(tmp_path):
    for part in ("train2017", "val2017"):
        coco(tmp_path / f"annotations/instances_{part}.json")
        for name in ("a.png", "b.png"):
            picture(tmp_path / part / name)
    both = {"a.png": {"zebra", "person"}, "b.png": {"person"}}
    assert read(tmp_path) == {"train": both, "test": both}
    assert open_dataset(str(tmp_path)).classes == ("person", "zebra")  # by category id


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"annotations": [{"image_id": 8, "category_id": 1}]}, "annotation 0: image_id 8 is not in the file"),
        ({"annotations": [{"image_id": 7, "category_id": 2}]}, "annotation 0: category_id 2 is not in the file"),
        ({"images": [{"id": 7, "file_name": "../a.png"}]}, "image 7: file_name '../a.png'; give it relative"),
        ({"images": [{"id": 7, "file_name": "/etc/passwd"}]}, "image 7: file_name '/etc/passwd'; give it relative"),
        ({"categories": [{"id": 1, "name": " "}]}, "category 1: class ' '"),
        ({"images": [{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}]}, "two images have id 7"),
        ({"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]}, "two categories have id 1"),
        ({"images": "many"}, "not annotations in COCO's form"),
        ({"images": [], "annotations": []}, "lists no picture"),
    ],
)
def test_damaged_annotations_are_refused_in_one_line(tmp_path, changes, problem):
    coco(tmp_path / "train.json", **changes)
    coco(tmp_path / "test.json")
    with pytest.raises(DataError) as refused:
        open_dataset(str(tmp_path))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name,labels\na.png,cat\n", "no column file_name or labels"),
        ("file_name,kind\na.png,cat\n", "no column file_name or labels"),
        ("file_name,labels\n../a.png,cat\n", "line 2: file_name '../a.png'; give it relative"),
        ("file_name,labels\na.png,cat;d\u202eog\n", "line 2: class"),
        ("file_name,labels\n", "lists no picture"),
        ("file_name,labels\ngone.png,cat\n", "'gone.png' is not in"),
        ("file_name,label\na.png,\n", "line 2: class ''"),
        ("file_name,labels\na.png,cat,dog\n", "line 2: more cells than columns"),
        ("file_name,labels\na.png\n", "line 2: no cell for labels"),
        ("file_name,labels,file_name\na.png,cat,b.png\n", "2 columns called file_name; leave one"),
    ],
)
def test_damaged_csvs_are_refused_in_one_line(tmp_path, text, problem):
    picture(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text(text, encoding="utf-8")
    (tmp_path / "test.csv").write_text("file_name,labels\na.png,cat\n")
    with pytest.raises(DataError) as refused:
        open_dataset(str(tmp_path))
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_metadata_file_that_tells_no_labels_leaves_folders_as_they_are(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / part / name / "a.png")
        (tmp_path / part / "metadata.csv").write_text("file_name,text\ncat/a.png,a cat on a sofa\n")
    found = open_dataset(str(tmp_path))
    assert found.classes == ("cat", "dog")
    assert found.train.labels.tolist() == [0, 1]


def test_labels_of_one_side_alone_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("file_name,labels\na.png,cat\n")
    with pytest.raises(DataError, match="none for test; add one"):
        open_dataset(str(tmp_path))


def features(tmp_path, **changes):
    rng = np.random.default_rng(0)
    given = {
        "train_features": rng.normal(size=(6, 4)).astype(np.float32),
        "train_labels": np.eye(3, dtype=np.uint8)[[0, 1, 2, 0, 1, 2]] | np.array([[0, 0, 1]], np.uint8),
        "test_features": rng.normal(size=(3, 4)).astype(np.float32),
        "test_labels": np.eye(3, dtype=bool),
        "class_names": ["a", "b", "c"],
    }
    save_features(tmp_path / "f.safetensors", **(given | changes))
    return open_dataset(str(tmp_path / "f.safetensors"))


def test_a_features_file_of_label_sets(tmp_path):
    found = features(tmp_path)
    assert found.train.targets.tolist() == [[True, False, True], [False, True, True], [False, False, True]] * 2
    assert found.test.labels.tolist() == [0, 1, 2]
    assert found.train[1].shape == (4,)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"test_labels": np.array([0, 1, 2])}, "train_labels and test_labels must both be"),
        ({"test_labels": np.eye(3, dtype=np.int64) * 2}, "test_labels has other numbers than 0 and 1 in row 0"),
        ({"test_labels": np.ones((3, 2), np.uint8)}, "they must be (n, d) and (n), or (n, 3)"),
        ({"test_labels": np.ones((3, 3), np.float32)}, "store whole numbers"),
        ({"test_labels": np.array([[1, 0, 0]] * 3)}, "class 'b' (number 1) has no row in test_features"),
    ],
)
def test_a_features_file_whose_label_sets_do_not_fit_is_refused(tmp_path, changes, problem):
    with pytest.raises(DataError) as refused:
        features(tmp_path, **changes)
    assert problem in str(refused.value)


def test_the_drawn_world_with_all_that_a_scene_shows():
    found = attributes_dataset()
    assert len(found.classes) == 31
    assert (found.train.targets.sum(1) == 4).all()
    assert (found.test.targets.sum(1) == 4).all()
    counts = dict(zip(found.classes, found.train.targets.sum(0).tolist(), strict=True))
    for kind in KINDS:
        own = [counts[word] for word in kind]
        assert sum(own) == len(found.train)
        assert RATIO / 3 < max(own) / min(own) < RATIO * 3
    scene = found.train.source.scenes[5]
    shown = {found.classes[c] for c in found.train.targets[5].nonzero()[0]}
    assert shown == {KINDS[0][scene.shape], KINDS[1][scene.colour], KINDS[2][scene.texture], KINDS[3][scene.background]}
    assert {scene.seed for scene in found.train.source.scenes}.isdisjoint(
        scene.seed for scene in attributes_dataset("dev").train.source.scenes
    )
