"""The catalogue, and local copies of hub data sets in each layout. No network."""

import builtins
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from cairn.data import catalogue
from cairn.data.catalogue import (
    CATALOGUE,
    SETTING_A_TEMPLATE,
    action_name,
    bird_name,
    scene_name,
    spaced,
    sun_names,
    wordnet_name,
)
from cairn.data.hub import HubImages, hub_dataset
from cairn.data.images import Dataset
from cairn.data.names import class_name
from cairn.data.opening import open_dataset
from cairn.data.stream import task_sizes, task_stream
from cairn.errors import CairnError, DataError, UnknownName
from cairn.storage.distribution import extra_remedy

datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def row(monkeypatch):
    """Change a row of the catalogue: the tests' copies are small."""

    def change(key, **changes):
        monkeypatch.setitem(CATALOGUE, key, dataclasses.replace(CATALOGUE[key], **changes))

    return change


def picture(i):
    return Image.new("RGB", (3, 2), (i % 256, 7, 9))


def table(labels, names=None, image="img", label="fine_label", **columns):
    """A split whose i-th picture has red = i. Labels are ClassLabel numbers where `names` is given."""
    features = {
        image: datasets.Image(),
        label: datasets.ClassLabel(names=names) if names else datasets.Value("string"),
        **{name: datasets.Value("int64" if isinstance(v[0], int) else "string") for name, v in columns.items()},
    }
    values = {image: [picture(i) for i in range(len(labels))], label: labels, **columns}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


NAMES = ["big_cat", "aquarium_fish", "owl"]  # not sorted: the copy's own order must survive


def cifar(root):
    copy = datasets.DatasetDict(train=table([0, 1, 2, 2, 1, 0], NAMES), test=table([2, 1, 0], NAMES))
    copy.save_to_disk(str(root / "copy"))
    return root / "copy"


def assert_refused(call, *parts, error=DataError):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# --- the table ---


def test_rows_are_what_the_issue_asks_for():
    assert list(CATALOGUE) == [
        "cifar100",
        "imagenet-r",
        "cub200",
        "ucf101",
        "aircraft",
        "cars",
        "food101",
        "sun397",
        "objectnet",
    ]
    assert SETTING_A_TEMPLATE == "a good photo of a {}."


@pytest.mark.parametrize("row", CATALOGUE.values(), ids=CATALOGUE)
def test_rows_are_sound(row):
    assert row.hub_id.count("/") == 1
    assert row.templates
    assert all(template.count("{}") == 1 for template in row.templates)
    assert len(set(row.templates)) == len(row.templates)
    assert row.classes == tuple(sorted(row.classes, reverse=True))
    assert row.image
    assert row.label
    assert row.train
    for base, step in row.protocols:
        assert sum(task_sizes(row.classes[-1], base, step)) == row.classes[-1]
        assert task_sizes(row.classes[-1], base, step)[-1] == step


def test_templates_are_setting_bs():
    assert CATALOGUE["cifar100"].templates[0] == "a photo of a {}."
    assert len(CATALOGUE["cifar100"].templates) == 18
    assert CATALOGUE["cifar100"].templates[-1] == "a photo of the big {}."
    assert len(CATALOGUE["ucf101"].templates) == 48
    assert CATALOGUE["ucf101"].templates[4] == "a photo of the person {}."
    assert CATALOGUE["ucf101"].templates[-1] == "a demonstration of the person practicing {}."


def test_licence_is_told():
    assert "forbids tuning" in CATALOGUE["objectnet"].note
    assert "middle" in CATALOGUE["ucf101"].note


@pytest.mark.parametrize(
    ("clean", "raw", "name"),
    [
        (spaced, "aquarium_fish", "aquarium fish"),
        (spaced, "AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
        (bird_name, "001.Black_footed_Albatross", "Black footed Albatross"),
        (bird_name, "Bobolink", "Bobolink"),
        (action_name, "ApplyEyeMakeup", "Apply Eye Makeup"),
        (action_name, "Archery", "Archery"),
        (action_name, "YoYo", "Yo Yo"),
        (scene_name, "/a/apse/indoor", "apse indoor"),
        (scene_name, "airplane cabin", "airplane cabin"),
        (wordnet_name, "n01443537", "goldfish"),
        (wordnet_name, "n12267677", "acorn"),
        (wordnet_name, "afghan_hound", "afghan hound"),
    ],
)
def test_class_names_are_cleaned(clean, raw, name):
    assert clean(raw) == name


def test_imagenet_r_has_200_different_names():
    names = catalogue._imagenet_r_names()
    assert len(names) == len(set(names.values())) == 200
    assert list(names) == sorted(names)
    assert all(key[0] == "n" and key[1:].isdecimal() and len(key) == 9 for key in names)


# --- layouts ---


def test_copy_from_save_to_disk(tmp_path, row):
    row("cifar100", classes=(3,))
    data = hub_dataset("cifar100", local=cifar(tmp_path))
    assert data.name == "cifar100"
    assert data.classes == ("big cat", "aquarium fish", "owl")
    assert data.templates == CATALOGUE["cifar100"].templates
    assert data.train.labels.tolist() == [0, 1, 2, 2, 1, 0]
    assert data.train.labels.dtype == np.int64
    assert data.test.labels.tolist() == [2, 1, 0]
    assert data.train[4].mode == "RGB"
    assert data.train[4].getpixel((0, 0)) == (4, 7, 9)
    assert data.train.describe(4) == "cifar100/train[4]"
    assert data.test.describe(0) == "cifar100/test[0]"


def test_whole_size_copy_of_cifar100(tmp_path):
    names = [f"thing_{i:02d}" for i in range(100)]
    labels = list(range(100))
    datasets.DatasetDict(train=table(labels, names), test=table(labels, names)).save_to_disk(str(tmp_path / "copy"))
    data = open_dataset(f"cifar100={tmp_path / 'copy'}")
    assert len(data.classes) == 100
    assert data.classes[41] == "thing 41"


@pytest.mark.parametrize("layout", ["{split}-00000-of-00001.parquet", "data/{split}.parquet", "{split}/0000.parquet"])
def test_parquet_files_in_the_hubs_layout(tmp_path, row, layout):
    row("cifar100", classes=(3,))
    for split, labels in (("train", [0, 1, 2]), ("test", [2, 1, 0])):
        file = tmp_path / "copy" / layout.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        table(labels, NAMES).to_parquet(str(file))
    data = hub_dataset("cifar100", local=tmp_path / "copy")
    assert data.classes == ("big cat", "aquarium fish", "owl")
    assert data.test.labels.tolist() == [2, 1, 0]
    assert data.train[2].getpixel((0, 0)) == (2, 7, 9)


def test_parquet_without_the_librarys_notes(tmp_path, row):
    import pyarrow
    import pyarrow.parquet

    row("cub200", classes=(2,))
    (tmp_path / "copy").mkdir()
    for split in ("train", "test"):
        pictures = []
        for i in range(2):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        columns = pyarrow.table({"image": pictures, "label": ["002.Laysan_Albatross", "001.Sooty_Albatross"]})
        pyarrow.parquet.write_table(columns, tmp_path / "copy" / f"{split}.parquet")
    data = hub_dataset("cub200", local=tmp_path / "copy")
    assert data.classes == ("Sooty Albatross", "Laysan Albatross")
    assert data.train.labels.tolist() == [1, 0]
    assert data.train[1].getpixel((0, 0)) == (1, 7, 9)


def test_folder_of_images(tmp_path, row, monkeypatch):
    row("ucf101", classes=(2,))
    for side in ("train", "test"):
        for name in ("ApplyEyeMakeup", "Archery"):
            folder = tmp_path / "copy" / side / name
            folder.mkdir(parents=True)
            picture(5).save(folder / "v_g01_c01.png")
    monkeypatch.setattr("cairn.data.hub._library", lambda row: pytest.fail("a plain folder needs no library"))
    data = hub_dataset("ucf101", local=tmp_path / "copy")
    assert data.name == "ucf101"
    assert data.classes == ("Apply Eye Makeup", "Archery")
    assert data.templates == CATALOGUE["ucf101"].templates
    assert data.train[0].getpixel((0, 0)) == (5, 7, 9)


def test_one_split_is_cut_per_class(tmp_path, row):
    row("imagenet-r", classes=(2,))
    ids = ["n01443537", "n01484850"]
    labels = [ids[i % 2] for i in range(20)]
    copy = datasets.DatasetDict(test=table(labels, image="image", label="wnid", class_name=["x"] * 20))
    copy.save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("imagenet-r", local=tmp_path / "copy")
    assert data.classes == ("goldfish", "great white shark")
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    shown = [side.describe(i) for side in (data.train, data.test) for i in range(len(side))]
    assert sorted(shown) == sorted(f"imagenet-r/test[{i}]" for i in range(20))
    again = hub_dataset("imagenet-r", local=tmp_path / "copy")
    assert task_stream(again, step=1).fingerprint == task_stream(data, step=1).fingerprint


def test_a_copy_that_was_cut_already_keeps_its_cut(tmp_path, row):
    row("imagenet-r", classes=(2,))
    parts = {side: table(["n01443537", "n01484850"] * 3, image="image", label="wnid") for side in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("imagenet-r", local=tmp_path / "copy")
    assert len(data.train) == len(data.test) == 6
    assert data.train.describe(0) == "imagenet-r/train[0]"


def test_a_single_saved_table(tmp_path, row):
    row("objectnet", classes=(2,))
    table(["air_freshener", "banana"] * 5, image="image", label="label").save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("objectnet", local=tmp_path / "copy")
    assert data.classes == ("air freshener", "banana")
    assert (len(data.train), len(data.test)) == (8, 2)


def test_train_and_validation_are_joined(tmp_path, row):
    row("aircraft", classes=(2,))
    names = ["707-320", "A300B4"]
    parts = {
        "train": table([0, 1], names, image="image", label="variant"),
        "val": table([1, 0, 0], names, image="image", label="variant"),
        "test": table([0, 1], names, image="image", label="variant"),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("aircraft", local=tmp_path / "copy")
    assert data.train.labels.tolist() == [0, 1, 1, 0, 0]
    assert data.train.describe(3) == "aircraft/val[1]"
    assert len(data.test) == 2


def test_middle_frame_of_each_video(tmp_path, row):
    row("ucf101", classes=(2,))
    clips, frames, labels = [], [], []
    for clip, (length, label) in {"b": (3, 0), "a": (4, 1)}.items():
        clips += [clip] * length
        frames += list(range(length, 0, -1))  # stored backwards: the position counts, not the row
        labels += [label] * length
    split = table(labels, ["Archery", "YoYo"], image="image", label="label", clip_id=clips, frame=frames)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("ucf101", local=tmp_path / "copy")
    assert data.train.labels.tolist() == [0, 1]
    chosen = [int(data.train.describe(i).partition("[")[2][:-1]) for i in range(2)]
    assert [(clips[i], frames[i]) for i in chosen] == [("b", 2), ("a", 3)]


def test_splits_may_number_their_classes_differently(tmp_path, row):
    row("cifar100", classes=(3,))
    copy = datasets.DatasetDict(train=table([0, 1, 2], NAMES), test=table([0, 1, 2], sorted(NAMES)))
    copy.save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("cifar100", local=tmp_path / "copy")
    assert data.classes == ("big cat", "aquarium fish", "owl")
    assert data.test.labels.tolist() == [1, 0, 2]


def test_images_are_decoded_when_asked_for(tmp_path, row, monkeypatch):
    row("cifar100", classes=(3,))
    copy = cifar(tmp_path)
    monkeypatch.setattr("datasets.Image.decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    stream = task_stream(hub_dataset("cifar100", local=copy), step=1)
    assert len(stream.tasks) == 3


# --- from the hub ---


def test_reading_from_the_hub(row, monkeypatch):
    row("cars", classes=(3,))
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        split = table([0, 1, 2], NAMES, image="image", label="label")
        return datasets.DatasetDict(train=split, test=split)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(hub_dataset("cars", revision="abc").train) == 3
    files = {"train": "data/train-*", "test": "data/test-*"}
    assert asked == [(("tanganke/stanford_cars", None), {"revision": "abc", "data_files": files})]


def test_hub_out_of_reach(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("cannot reach it\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert_refused(
        lambda: open_dataset("cifar100"),
        "data 'cifar100'",
        "'uoft-cs/cifar100'",
        "cannot reach it",
        "give a local copy: cifar100=PATH",
    )


def test_library_absent(tmp_path, monkeypatch):
    copy, real = cifar(tmp_path), builtins.__import__

    def without(name, *rest, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert_refused(lambda: hub_dataset("cifar100", local=copy), "data 'cifar100'", extra_remedy("hub"))


# --- complaints ---


def test_unknown_key():
    assert_refused(
        lambda: hub_dataset("cifar10"), "unknown dataset 'cifar10'", "did you mean cifar100", error=UnknownName
    )


def test_copy_is_missing(tmp_path):
    assert_refused(
        lambda: hub_dataset("cifar100", local=tmp_path / "nowhere"), "nowhere", "no such folder", "local copy"
    )


def test_wrong_number_of_classes(tmp_path):
    assert_refused(
        lambda: hub_dataset("cifar100", local=cifar(tmp_path)),
        "data 'cifar100'",
        "has 3 classes",
        "CIFAR-100 has 100",
        "use a whole copy",
    )


def test_wrong_number_of_class_folders(tmp_path):
    for side in ("train", "test"):
        (tmp_path / "copy" / side / "x").mkdir(parents=True)
        picture(0).save(tmp_path / "copy" / side / "x" / "0.png")
    assert_refused(lambda: hub_dataset("sun397", local=tmp_path / "copy"), "has 1 class,", "SUN397 has 397 or 300")


def test_missing_split(tmp_path):
    datasets.DatasetDict(train=table([0], NAMES), extra=table([0], NAMES)).save_to_disk(str(tmp_path / "copy"))
    assert_refused(
        lambda: hub_dataset("cifar100", local=tmp_path / "copy"),
        "no split 'test' or 'validation' or 'val'",
        "the copy has train, extra",
        "use a whole copy",
    )


def test_missing_training_split(tmp_path):
    datasets.DatasetDict(test=table([0], NAMES)).save_to_disk(str(tmp_path / "copy"))
    assert_refused(lambda: hub_dataset("cifar100", local=tmp_path / "copy"), "no split 'train'", "the copy has test")


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [({"label": "kind"}, "'fine_label' or 'label'"), ({"image": "picture"}, "'img' or 'image'")],
)
def test_missing_column(tmp_path, row, columns, wanted):
    row("cifar100", classes=(3,))
    split = table([0, 1, 2], NAMES, **columns)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "copy"))
    assert_refused(
        lambda: hub_dataset("cifar100", local=tmp_path / "copy"),
        f"no column {wanted}",
        "the copy has",
        next(iter(columns.values())),
        "rename its column",
    )


def test_numbers_without_names(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    split = datasets.Dataset.from_dict({"img": [picture(0)], "label": [0]}, features=features)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "copy"))
    assert_refused(
        lambda: hub_dataset("cifar100", local=tmp_path / "copy"), "column 'label'", "int64", "ClassLabel or strings"
    )


def test_hidden_labels(tmp_path):
    split = table([0, -1, 2], NAMES)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "copy"))
    assert_refused(
        lambda: hub_dataset("cifar100", local=tmp_path / "copy"), "'fine_label' hides its labels (-1)", "use a copy"
    )


def test_names_that_become_equal(tmp_path, row):
    row("cifar100", classes=(2,))
    split = table([0, 1], ["big_cat", "big cat"])
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "copy"))
    assert_refused(lambda: hub_dataset("cifar100", local=tmp_path / "copy"), "both called 'big cat'", "rename one")


def test_class_too_small_to_cut(tmp_path, row):
    row("objectnet", classes=(2,))
    table(["banana"] * 5 + ["belt"], image="image", label="label").save_to_disk(str(tmp_path / "copy"))
    assert_refused(
        lambda: hub_dataset("objectnet", local=tmp_path / "copy"), "class 'belt' has one image", "the whole copy"
    )


def test_class_without_images_is_found_by_the_stream(tmp_path, row):
    row("cifar100", classes=(3,))
    copy = datasets.DatasetDict(train=table([0, 1, 2], NAMES), test=table([0, 1], NAMES))
    copy.save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("cifar100", local=tmp_path / "copy")
    assert_refused(lambda: task_stream(data, step=1), "data 'cifar100'", "class 'owl' has no test image")


def test_damaged_copy(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    assert_refused(
        lambda: hub_dataset("cifar100", local=tmp_path), f"'cifar100={tmp_path}'", "damaged copy", "copy it again"
    )


def test_damaged_image_is_named(tmp_path, row):
    row("cifar100", classes=(3,))
    raw = datasets.Features({"img": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)})
    values = {"img": [{"bytes": b"no image", "path": None}] * 3, "label": [0, 1, 2]}
    split = datasets.Dataset.from_dict(values, features=raw).cast_column("img", datasets.Image())
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "copy"))
    data = hub_dataset("cifar100", local=tmp_path / "copy")
    assert_refused(lambda: data.train[1], "image cifar100/train[1]", "cannot be read", "repair the copy")


# --- one name for everything ---


def test_a_folder_a_file_and_a_key(tmp_path, row):
    from cairn.data.embeddings import save_features

    for side in ("train", "test"):
        (tmp_path / "pets" / side / "cat").mkdir(parents=True)
        picture(0).save(tmp_path / "pets" / side / "cat" / "0.png")
    assert open_dataset(str(tmp_path / "pets")).classes == ("cat",)

    values = {"features": np.eye(2, dtype=np.float32), "labels": np.arange(2)}
    both = {f"{part}_{name}": value for part in ("train", "test") for name, value in values.items()}
    save_features(tmp_path / "f.safetensors", **both, class_names=["a", "b"])
    assert open_dataset(str(tmp_path / "f.safetensors")).embeddings.dim == 2

    row("cifar100", classes=(3,))
    assert open_dataset(f"cifar100={cifar(tmp_path)}").name == "cifar100"


def test_the_drawn_world(monkeypatch):
    def world(part):
        return Dataset(part, (), None, None, ("{}",))

    monkeypatch.setattr("cairn.data.shapes.shapes_dataset", world, raising=False)
    assert open_dataset("shapes").name == open_dataset("shapes:stream").name == "stream"
    assert open_dataset("shapes:dev").name == "dev"
    assert_refused(
        lambda: open_dataset("shapes:pretraining"), "unknown part of shapes 'pretraining'", error=UnknownName
    )


@pytest.mark.parametrize(
    ("spec", "error", "parts"),
    [
        ("cifar10", UnknownName, ["unknown dataset 'cifar10'", "did you mean cifar100"]),
        ("shape", UnknownName, ["unknown dataset 'shape'", "did you mean shapes"]),
        ("cifr=copies/cifar100", UnknownName, ["unknown dataset 'cifr'", "cifar100"]),
        ("no/such/folder", DataError, ["data 'no/such/folder'", "no such folder or file", "check the path"]),
        ("./gone", DataError, ["data './gone'", "no such folder or file"]),
        ("~/no-such-folder-at-all", DataError, ["no such folder or file"]),
        ("gone.safetensors", DataError, ["features file 'gone.safetensors'", "no such file"]),
        ("cifar100=", DataError, ["data 'cifar100='", "no path after '='", "cifar100=PATH"]),
        ("cifar100=no/such", DataError, ["data 'cifar100=no/such'", "no such folder"]),
    ],
)
def test_names_of_nothing(spec, error, parts):
    assert issubclass(error, CairnError)
    assert_refused(lambda: open_dataset(spec), *parts, error=error)


# --- identity ---


def test_an_image_is_its_encoded_file(tmp_path, row):
    row("cifar100", classes=(3,))
    data = open_dataset(f"cifar100={cifar(tmp_path)}")
    known = [data.train.identity(i) for i in range(6)]
    assert len(set(known)) == 6
    assert known[:3] == [data.test.identity(i) for i in range(3)]  # the same pictures
    assert Image.open(io.BytesIO(known[4])).getpixel((0, 0)) == (4, 7, 9)


def test_an_image_that_a_table_has_by_its_path_is_the_file(tmp_path):
    picture(5).save(tmp_path / "five.png")
    rows = datasets.Dataset.from_dict({"img": [str(tmp_path / "five.png")]}).cast_column("img", datasets.Image())
    assert HubImages(rows, "img", np.zeros(1), "made").identity(0) == (tmp_path / "five.png").read_bytes()


def test_published_classes_are_the_first_by_folder_name(tmp_path, row):
    row("cars", classes=(5,), published=3)
    names = [
        "Audi V8 Sedan 1994",
        "Audi TT Hatchback 2011",
        "Audi TTS Coupe 2012",
        "AM General Hummer SUV 2000",
        "Yugo 1",
    ]
    copy = datasets.DatasetDict(
        train=table([0, 1, 2, 3, 4, 1], names, image="image", label="label"),
        test=table([4, 3, 2, 1, 0], names, image="image", label="label"),
    )
    copy.save_to_disk(str(tmp_path / "copy"))
    data = open_dataset(f"cars:published={tmp_path / 'copy'}")
    assert data.classes == ("AM General Hummer SUV 2000", "Audi TTS Coupe 2012", "Audi TT Hatchback 2011")
    assert data.train.labels.tolist() == [2, 1, 0, 2]
    assert [data.train[i].getpixel((0, 0))[0] for i in range(4)] == [1, 2, 3, 5]
    assert data.test.labels.tolist() == [0, 1, 2]
    assert len(open_dataset(f"cars={tmp_path / 'copy'}").classes) == 5


def test_published_classes_by_name_take_all_that_begin_with_it(tmp_path, row):
    row("sun397", classes=(7,), published=3, published_names=lambda: ("forest", "forest path", "office"))
    raw = [
        "/f/forest/needleleaf",
        "/o/office",
        "/f/forest_path",
        "/s/sky",
        "/f/forest/broadleaf",
        "/o/office_block",
        "/h/home_office",
    ]
    copy = datasets.DatasetDict(
        train=table([0, 1, 2, 3, 4, 5, 6], raw, image="image", label="label"),
        test=table([6, 5, 4, 3, 2, 1, 0], raw, image="image", label="label"),
    )
    copy.save_to_disk(str(tmp_path / "copy"))
    data = open_dataset(f"sun397:published={tmp_path / 'copy'}")
    assert data.classes == ("forest", "forest path", "office")
    assert data.train.labels.tolist() == [0, 2, 1, 0, 2]
    assert data.test.labels.tolist() == [2, 0, 1, 2, 0]
    row("sun397", classes=(7,), published=3, published_names=lambda: ("forest", "canyon", "office"))
    assert_refused(
        lambda: open_dataset(f"sun397:published={tmp_path / 'copy'}"), "sun397:published", "no class 'canyon'"
    )


def test_the_classes_of_sun_are_three_hundred_in_the_order_of_their_folders():
    names = sun_names()
    assert len(set(names)) == 300
    assert list(names) == sorted(names, key=lambda name: name.replace(" ", "_"))
    assert (names[0], names[-1]) == ("abbey", "ski slope")
    assert all(class_name(scene_name(f"/{name[0]}/{name.replace(' ', '_')}")) == name for name in names)


def test_parts_that_there_are_not(tmp_path, row):
    row("cifar100", classes=(3,))
    assert_refused(lambda: open_dataset(f"cifar100:published={cifar(tmp_path)}"), "cifar100:published", "not known")
    assert_refused(lambda: open_dataset("cars:publishd"), "publishd", "published", error=UnknownName)
