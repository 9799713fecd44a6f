"""Data sets of Hugging Face, pandas and PyTorch as labelled pictures, with the libraries themselves."""

from __future__ import annotations

import csv
import subprocess
import sys

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from cairn import IncrementalClassifier
from cairn.data.in_memory import InMemoryImages
from cairn.data.labelled import labelled_pictures
from cairn.data.labelled_datasets import labelled_items
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError, InvalidInput

CLASSES = ["tea cup", "tea pot", "mug"]
TARGETS = [2, 0, 0, 1, 2, 2, 0]
NAMES = [CLASSES[c] for c in TARGETS]


def arrays():
    return list(np.random.default_rng(3).integers(0, 256, (len(TARGETS), 12, 12, 3), dtype=np.uint8))


@pytest.fixture
def files(tmp_path):
    """PNGs in `pictures/<class>/`, in the order of TARGETS."""
    found = []
    for i, (array, name) in enumerate(zip(arrays(), NAMES, strict=True)):
        found.append(tmp_path / "pictures" / name / f"{i}.png")
        found[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(found[-1])
    return found


def hugging_face(pictures, **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    given = {"image": [str(file) for file in pictures], "label": TARGETS} | columns
    if any(isinstance(label, str) for label in given["label"]):
        del features["label"]
    kept = {name: features.get(name, datasets.Value("string")) for name in given}
    return datasets.Dataset.from_dict(given, features=datasets.Features(kept))


class Pictures(Dataset):
    """As torchvision's: `classes`, and rows (image, target)."""

    def __init__(self, targets=TARGETS, classes=CLASSES, transform=None):
        self.targets, self.transform = targets, transform
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = Image.fromarray(arrays()[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def hashes(items):
    return InMemoryImages(items, np.zeros(len(items), dtype=np.int64)).content_hashes()


@pytest.fixture
def expected(files):
    return hashes(files)


@pytest.mark.parametrize("decoding", [True, False])
def test_a_hugging_face_dataset_gives_the_pictures_of_its_files(files, expected, decoding):
    dataset = hugging_face(files).cast_column("image", datasets.Image(decode=decoding))
    items, names = labelled_items(dataset)
    assert names == NAMES
    assert hashes(items) == expected
    items, names = labelled_items(dataset.select([4, 1]).with_format("torch"))
    assert names == ["mug", "tea cup"]
    assert hashes(items) == [expected[4], expected[1]]


def test_an_imagefolder_gives_the_pictures_of_its_files(files, expected, tmp_path):
    dataset = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pictures"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    items, names = labelled_items(dataset)
    by_hash = dict(zip(expected, NAMES, strict=True))
    assert sorted(hashes(items)) == sorted(expected)
    assert [by_hash[value] for value in hashes(items)] == names


def test_texts_are_labels_where_there_is_no_classlabel(files, expected):
    dataset = hugging_face(files, label=NAMES)
    items, names = labelled_items(dataset)
    assert names == NAMES
    assert hashes(items) == expected
    renamed = dataset.rename_column("label", "kind")
    assert labelled_items(renamed)[1] == NAMES
    # of several, the one called label
    assert labelled_items(dataset.add_column("note", ["seen"] * len(TARGETS)))[1] == NAMES


def test_a_table_of_pandas_gives_its_files(files, expected):
    frame = pandas.DataFrame({"label": NAMES, "path": [str(file) for file in files]}, index=range(10, 10 + len(files)))
    items, names = labelled_items(frame)
    assert names == NAMES
    assert hashes(items) == expected
    frame = frame.rename(columns={"path": "file_name"}).assign(label=frame.label.astype("category"), size=3)
    items, names = labelled_items(frame[frame.label == "mug"])
    assert names == ["mug"] * 3
    assert hashes(items) == [expected[0], expected[4], expected[5]]


def test_rows_of_image_and_target(expected):
    items, names = labelled_items(Pictures())
    assert names == NAMES
    assert hashes(items) == expected
    items, names = labelled_items(Subset(Subset(Pictures(), [5, 3, 1]), [2, 0]))
    assert names == ["tea cup", "mug"]
    assert hashes(items) == [expected[1], expected[5]]
    assert labelled_items(ConcatDataset([Pictures(), Pictures()]))[1] == NAMES * 2
    assert labelled_items(Pictures(NAMES, classes=None))[1] == NAMES
    targets = [torch.tensor(2), np.int64(0), 1, np.array(1)]
    assert labelled_items(Pictures(targets))[1] == ["mug", "tea cup", "tea pot", "tea pot"]
    assert labelled_items([(arrays()[0], "a"), (arrays()[1], "b")])[1] == ["a", "b"]


def test_pictures_are_read_when_they_are_asked_for(files):
    dataset = hugging_face(files)
    items, _ = labelled_items(dataset)
    files[2].unlink()
    images = InMemoryImages(items, np.zeros(len(items), dtype=np.int64))
    assert images[1].size == (12, 12)
    with pytest.raises(InvalidInput, match="image 'row 2': cannot be read"):
        images[2]


def second_label(files):
    one = hugging_face(files)
    return one.rename_column("label", "fine").add_column("coarse", TARGETS, feature=datasets.ClassLabel(names=CLASSES))


REFUSED = {
    "none of these": (lambda files: {1: 2}, "none given beside images of type dict"),
    "one file": (lambda files: "a.png", "none given beside images of type str"),
    "files alone": (lambda files: files, "row 0 is PosixPath, not (image, target); give one class name"),
    "an array": (lambda files: np.stack(arrays()), "row 0 is ndarray, not (image, target)"),
    "splits": (lambda files: datasets.DatasetDict(train=hugging_face(files)), "of 'train'; give one of them"),
    "a stream": (lambda files: hugging_face(files).to_iterable_dataset(), "streamed data set; load it without"),
    "no picture column": (lambda files: hugging_face(files).remove_columns("image"), "has not a column of type Image"),
    "no label column": (
        lambda files: hugging_face(files).remove_columns("label"),
        "has not a column of type ClassLabel",
    ),
    "two label columns": (second_label, "'fine', 'coarse' are each a column of type ClassLabel"),
    "numbers": (
        lambda files: hugging_face(files).cast_column("label", datasets.Value("int64")),
        "of type int64; cast it",
    ),
    "unlabelled": (lambda files: hugging_face(files, label=[2, -1, 0, 1, None, 2, 0]), "2 rows (1, 4): no label"),
    "a text that is none": (
        lambda files: hugging_face(files, label=[*NAMES[:3], None, *NAMES[4:]]),
        "1 row (3): no label",
    ),
    "table without label": (lambda files: pandas.DataFrame({"file_name": files, "kind": NAMES}), "no column label"),
    "table of three": (lambda files: pandas.DataFrame({"a": files, "b": files, "label": NAMES}), "'a', 'b': which are"),
    "table of labels": (lambda files: pandas.DataFrame({"label": NAMES}), "label and no other column: which are"),
    "table with gaps": (
        lambda files: pandas.DataFrame({"file_name": files, "label": [*NAMES[:5], None, float("nan")]}),
        "2 rows (5, 6): no label",
    ),
    "table without files": (
        lambda files: pandas.DataFrame({"file_name": [*files[:6], None], "label": NAMES}),
        "1 row (6): no file",
    ),
    "table of numbers": (lambda files: pandas.DataFrame({"file_name": files, "label": TARGETS}), "label 2: a class is"),
    "target without label": (lambda files: Pictures([0, -1, 2]), "1 row (1): no label"),
    "target without classes": (
        lambda files: Pictures(classes=None),
        "row 0: target 2, and the data set has no `classes`",
    ),
    "target too large": (lambda files: Pictures([0, 3]), "row 1: target 3, and the data set has 3 classes"),
    "target of a kind": (lambda files: Pictures([0.5]), "row 0: target 0.5; must be a class name or"),
    "different classes": (lambda files: ConcatDataset([Pictures(), Pictures(classes=CLASSES[::-1])]), "classes differ"),
    "random": (
        lambda files: Pictures(transform=lambda image: torch.randint(256, (8, 8, 3), dtype=torch.uint8)),
        "differ each time",
    ),
    "tensors": (lambda files: Pictures(transform=lambda image: torch.rand(3, 8, 8)), "an array of float32 (3, 8, 8)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_labels_is_refused_in_one_line(case, files):
    make, said = REFUSED[case]
    with pytest.raises(InvalidInput) as refused:
        IncrementalClassifier("simplecil", towers="tiny").partial_fit(make(files))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_embeddings_have_labels_beside_them():
    with pytest.raises(InvalidInput, match="takes embeddings, with one class name for each"):
        IncrementalClassifier("simplecil", towers="rows").partial_fit(np.eye(4, dtype=np.float32))


def test_a_learner_of_a_dataset_is_that_of_its_files(tmp_path):
    world = shapes_dataset()
    rows = np.flatnonzero(world.train.labels < 3)[:60]
    rng = np.random.default_rng(0)
    rows = rng.permutation(rows)[:50]  # unequal classes
    files = [tmp_path / f"{row}.png" for row in rows]
    for file, row in zip(files, rows, strict=True):
        Image.fromarray(world.train[row]).save(file)
    names = [world.classes[c] for c in world.train.labels[rows]]

    def learned(*given):
        learner = IncrementalClassifier("lda", towers="tiny").fit(*given)
        return learner, learner.predictions(files).scores

    plain, expected = learned(files, names)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(world.classes[:3])))
    dataset = datasets.Dataset.from_dict({"image": [str(file) for file in files], "label": names}, features=features)
    frame = pandas.DataFrame({"file_name": files, "label": names})
    for given in (dataset, frame, [(world.train[row], name) for row, name in zip(rows, names, strict=True)]):
        learner, scores = learned(given)
        assert learner.classes_.tolist() == plain.classes_.tolist()
        assert torch.equal(scores, expected)
        assert (
            learner.partial_fit(frame).counts_.tolist() == plain.counts_.tolist()
        )  # known again, whatever they came in
        assert learner.evaluate(given).accuracy == plain.evaluate(files, names).accuracy == learner.score(frame)


def test_neither_library_is_imported():
    code = "import sys, cairn, cairn.data.labelled_datasets; print({'datasets', 'pandas'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.fixture
def nested(tmp_path):
    root = tmp_path / "pictures"
    world = shapes_dataset()
    for c, place in (
        (0, "cup/a.png"),
        (0, "cup/2024/may/a.png"),
        (0, "cup/2024/b.png"),
        (1, "pot/old/c.png"),
        (1, "pot/d.png"),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        row = np.flatnonzero(world.train.labels == c)[len(list(root.rglob("*.png")))]
        Image.fromarray(world.train[row]).save(root / place)
    return root


def test_recursive_takes_folders_inside_a_class(nested, tmp_path, cairn):
    found = labelled_pictures(nested, recursive=True)
    relative = [file.relative_to(nested).as_posix() for file in found.files]
    assert dict(zip(relative, found.names, strict=True)) == {
        "cup/2024/b.png": "cup",
        "cup/2024/may/a.png": "cup",
        "cup/a.png": "cup",
        "pot/d.png": "pot",
        "pot/old/c.png": "pot",
    }
    assert found.notices == ()
    flat = labelled_pictures(nested)
    assert [file.name for file in flat.files] == ["a.png", "d.png"]
    assert "--recursive" in flat.notices[0]
    (nested / "pot" / "linked").symlink_to(nested / "cup")
    assert "1 linked folder" in labelled_pictures(nested, recursive=True).notices[0]

    learner, options = tmp_path / "shop", ["--recursive", "--device", "cpu"]
    assert cairn("learn", learner, nested, "--method", "simplecil", "--towers", "tiny", *options)[0] == 0
    assert IncrementalClassifier.load(learner).counts_.tolist() == [3, 2]
    status, out, _ = cairn("evaluate", learner, nested, "--csv", *options)
    rows = list(csv.DictReader(out.splitlines()))
    assert status == 0
    assert [(row["class"], row["pictures"]) for row in rows] == [("cup", "3"), ("pot", "2")]


def test_recursive_is_for_folders(files, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,mug\n")
    for given in (tmp_path, tmp_path / "metadata.csv"):
        with pytest.raises(ConfigError, match=r"--recursive: '.*metadata.csv' says which pictures there are"):
            labelled_pictures(given, recursive=True)
