"""Features files: what is read, what is written, what is refused."""

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cairn.data.embeddings import features_dataset, save_features
from cairn.data.stream import task_stream
from cairn.errors import DataError, ResultError

REAL = Path(__file__).parents[3] / "shared" / "data" / "clip-vit-b32-features"
NAMES = ["cat", "dog", "grey owl"]


def tensors(k=3, d=4, train=5, test=2):
    rng = np.random.default_rng(0)
    values = {}
    for part, each in (("train", train), ("test", test)):
        values[f"{part}_features"] = torch.tensor(rng.normal(size=(k * each, d)), dtype=torch.float32)
        values[f"{part}_labels"] = torch.arange(k).repeat(each)
    return values


def write(path, metadata=None, **changes):
    values = {name: value for name, value in (tensors() | changes).items() if value is not None}
    save_file(values, path, metadata={"class_names": json.dumps(NAMES)} if metadata is None else metadata)
    return path


def assert_refused(path, *parts):
    with pytest.raises(DataError) as error:
        features_dataset(path)
    text = str(error.value)
    assert "\n" not in text
    for part in (f"features file '{path}'", *parts):
        assert part in text


# --- reading ---


def test_rows_labels_and_names(tmp_path):
    file = write(tmp_path / "toy.safetensors")
    data, stored = features_dataset(file), tensors()
    assert data.name == "toy"
    assert data.classes == tuple(NAMES)
    assert data.templates == ("a photo of a {}.",)
    assert data.train.labels.dtype == np.int64
    assert data.train.labels.tolist() == stored["train_labels"].tolist()
    assert data.test[3].dtype == np.float32
    assert np.array_equal(data.test[3], stored["test_features"][3].numpy())
    assert np.array_equal(data.train.values, stored["train_features"].numpy())
    assert data.train.describe(7) == "train_features[7]"
    assert (len(data.train), len(data.test)) == (15, 6)


def test_what_comes_besides_the_rows(tmp_path):
    text = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    metadata = {
        "class_names": json.dumps(NAMES),
        "templates": '["a {}", "the {}"]',
        "logit_scale": "50.5",
        "model": "some CLIP",
    }
    file = write(tmp_path / "toy.safetensors", metadata, text_features=text)
    data = features_dataset(file)
    assert data.templates == ("a {}", "the {}")
    assert data.embeddings.dim == 4
    assert data.embeddings.text.dtype == np.float32
    assert np.array_equal(data.embeddings.text, text.float().numpy())
    assert data.embeddings.logit_scale == 50.5
    assert data.embeddings.name == "some CLIP"
    assert data.embeddings.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def test_defaults_of_what_may_be_left_out(tmp_path):
    found = features_dataset(write(tmp_path / "toy.safetensors")).embeddings
    assert found.text is None
    assert found.logit_scale == 100.0
    assert found.name == "toy"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_becomes_float32(tmp_path, dtype):
    stored = {name: value.to(dtype) for name, value in tensors().items() if "features" in name}
    row = features_dataset(write(tmp_path / "toy.safetensors", **stored)).train[2]
    assert row.dtype == np.float32
    assert np.array_equal(row, stored["train_features"][2].float().numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_whole_numbers_are_labels(tmp_path, dtype):
    labels = tensors()["train_labels"]
    found = features_dataset(write(tmp_path / "toy.safetensors", train_labels=labels.to(dtype))).train.labels
    assert found.dtype == np.int64
    assert found.tolist() == labels.tolist()


@pytest.mark.parametrize("key", ["class_names", "classnames", "classes", "names"])
@pytest.mark.parametrize(
    "written",
    [
        json.dumps(NAMES),
        "cat\ndog\n\ngrey owl\n",
        '{"1": "dog", "0": "cat", "2": "grey owl"}',
        '{"dog": 1, "cat": 0, "grey owl": 2}',
    ],
)
def test_class_names_in_any_sensible_form(tmp_path, key, written):
    assert features_dataset(write(tmp_path / "toy.safetensors", {key: written})).classes == tuple(NAMES)


def test_a_single_template_as_plain_text(tmp_path):
    file = write(tmp_path / "toy.safetensors", {"class_names": json.dumps(NAMES), "template": "a {}"})
    assert features_dataset(file).templates == ("a {}",)


@pytest.mark.parametrize(
    ("written", "read"),
    [('"a {}"', ("a {}",)), ("{}", ("{}",)), ("a {}\nthe {}\n", ("a {}", "the {}")), (" ", ("a photo of a {}.",))],
)
def test_templates_in_any_sensible_form(tmp_path, written, read):
    file = write(tmp_path / "toy.safetensors", {"class_names": json.dumps(NAMES), "templates": written})
    assert features_dataset(file).templates == read


def test_a_stream_is_cut_from_rows(tmp_path):
    stream = task_stream(features_dataset(write(tmp_path / "toy.safetensors")), step=2)
    assert [len(task.train) for task in stream.tasks] == [10, 5]
    assert stream.tasks[1].train[0].shape == (4,)


# --- refusals ---


def test_missing_file(tmp_path):
    assert_refused(tmp_path / "nowhere.safetensors", "no such file", "give the path of a .safetensors file")


def test_not_a_safetensors_file(tmp_path):
    file = tmp_path / "toy.safetensors"
    file.write_bytes(b"PK\x03\x04 something else entirely")
    assert_refused(file, "not a safetensors file, or a damaged one", "write it again")


def test_truncated_file(tmp_path):
    file = write(tmp_path / "toy.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    assert_refused(file, "not a safetensors file, or a damaged one", "write it again")


def test_empty_file(tmp_path):
    (tmp_path / "toy.safetensors").touch()
    assert_refused(tmp_path / "toy.safetensors", "not a safetensors file, or a damaged one")


def test_missing_tensors_are_named(tmp_path):
    file = write(tmp_path / "toy.safetensors", test_features=None, test_labels=None)
    assert_refused(file, "lacks test_features, test_labels", "it holds train_features, train_labels")


def test_no_class_names(tmp_path):
    file = write(tmp_path / "toy.safetensors", {})
    assert_refused(
        file, "metadata class_names: field required; store a JSON list of different names under 'class_names'"
    )


ODD_NAMES = {
    "numbers": ("[1, 2, 3]", "class_names.0: must be a valid string, not 1"),
    "an empty one": ('["a", " "]', "class_names.1: must have a visible character"),
    "an empty list": ("[]", "class_names: list should have at least 1 item"),
    "a number": ("3", "class_names: must be a list of names"),
    "numbered with a gap": ('{"a": 0, "b": 5}', "class_names: must number its names from 0, each once"),
    "names of names": ('{"a": "x", "b": "y"}', "class_names: must number its names from 0, each once"),
    "a number twice": ('{"0": "a", "0": "b"}', "class_names: must be JSON as it begins"),
    "cut off": ('["cat", "dog"', "class_names: must be JSON as it begins"),
    "deep": ("[" * 50_000, "class_names: must be JSON as it begins"),
    "half a character": (r'["cat", "\ud800", "owl"]', "class_names: must be JSON as it begins"),
    "a control character": (r'["cat", "\u001b[31mdog", "owl"]', "class_names.1: holds a control character"),
    "right to left": (r'["cat", "\u202edog", "owl"]', "class_names.1: holds a control character, an invisible"),
    "a name twice": ('["cat", "dog", "cat"]', "class_names: class name 'cat' appears twice"),
    "one name in two spellings": (r'["caf\u00e9", "cafe\u0301"]', "class_names: class name 'caf\u00e9' appears twice"),
}  # fmt: skip


@pytest.mark.parametrize(("written", "why"), ODD_NAMES.values(), ids=ODD_NAMES)
def test_class_names_that_are_none(tmp_path, written, why):
    file = write(tmp_path / "toy.safetensors", {"class_names": written})
    assert_refused(file, f"metadata {why}", "; store a JSON list of different names under 'class_names'")


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"train_features": torch.zeros(15, 2, 2)}, ["train_features (15, 2, 2)", "train_labels (15)"]),
        ({"train_labels": torch.zeros(15, 1, dtype=torch.int64)}, ["train_features (15, 4)", "train_labels (15, 1)"]),
        ({"test_features": torch.zeros(7, 4)}, ["test_features (7, 4)", "test_labels (6)"]),
    ],
)
def test_shapes_that_do_not_fit(tmp_path, changes, shapes):
    assert_refused(write(tmp_path / "toy.safetensors", **changes), *shapes, "they must be (n, d) and (n)")


def test_rows_without_columns(tmp_path):
    file = write(tmp_path / "toy.safetensors", train_features=torch.zeros(15, 0))
    assert_refused(file, "train_features (15, 0)", "store rows of floating point numbers")


def test_features_of_whole_numbers(tmp_path):
    file = write(tmp_path / "toy.safetensors", test_features=torch.zeros(6, 4, dtype=torch.int32))
    assert_refused(file, "test_features (6, 4) of int32", "store rows of floating point numbers")


def test_widths_that_differ(tmp_path):
    file = write(tmp_path / "toy.safetensors", test_features=torch.zeros(6, 5))
    assert_refused(file, "train_features (15, 4)", "test_features (6, 5)", "differ in width", "the same model")


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (12,)])
def test_texts_that_do_not_fit(tmp_path, shape):
    file = write(tmp_path / "toy.safetensors", text_features=torch.zeros(*shape))
    shown = "(" + ", ".join(map(str, shape)) + ")"
    assert_refused(file, f"text_features {shown}", "3 class names and 4 columns", "store floating point (3, 4)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_whole_numbers(tmp_path, dtype):
    file = write(tmp_path / "toy.safetensors", train_labels=torch.zeros(15, dtype=dtype))
    assert_refused(file, f"train_labels are {str(dtype)[6:]}", "store whole numbers from 0")


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_out_of_range(tmp_path, wrong):
    labels = tensors()["test_labels"].clone()
    labels[4:] = wrong
    file = write(tmp_path / "toy.safetensors", test_labels=labels)
    assert_refused(file, f"test_labels has {wrong} in row 4 (2 such rows)", "3 class names", "labels must be 0 to 2")


@pytest.mark.parametrize("part", ["train", "test"])
def test_more_names_than_classes(tmp_path, part):
    labels = tensors()[f"{part}_labels"].clamp(max=1)
    file = write(tmp_path / "toy.safetensors", **{f"{part}_labels": labels})
    assert_refused(
        file, "3 class names, but class 'grey owl' (number 2) has no row", f"{part}_features", "remove the name"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["train_features", "test_features", "text_features"])
def test_rows_that_are_not_finite(tmp_path, name, value):
    values = torch.zeros({"train_features": 15, "test_features": 6, "text_features": 3}[name], 4)
    values[1, 2] = values[2, 0] = values[2, 1] = value
    file = write(tmp_path / "toy.safetensors", **{name: values})
    assert_refused(file, f"{name} is not finite in row 1 (2 such rows)", "embed them again or leave them out")


ODD_TEMPLATES = {
    "no slot": ("no slot", "templates.0: must hold {} once"),
    "one without": ('["a {}", "none"]', "templates.1: must hold {} once"),
    "two slots": ("{} and {}", "templates.0: must hold {} once"),
    "none": ("[]", "templates: list should have at least 1 item"),
    "numbers": ("[7]", "templates.0: must be a valid string, not 7"),
    "cut off": ('["a {}"', "templates: must be JSON as it begins"),
    "half a character": (r'["a \ud800 {}"]', "templates: must be JSON as it begins"),
    "a control character": ("a \x1b]0;title\x07 {}", "templates.0: holds a control character"),
}  # fmt: skip


@pytest.mark.parametrize(("written", "why"), ODD_TEMPLATES.values(), ids=ODD_TEMPLATES)
def test_templates_that_are_none(tmp_path, written, why):
    file = write(tmp_path / "toy.safetensors", {"class_names": json.dumps(NAMES), "templates": written})
    assert_refused(file, f"metadata {why}", "; store a JSON list of texts with {} once in each")


@pytest.mark.parametrize("written", ["warm", "0", "-3", "nan", "inf", "1e308", "1e-320", "[100]"])
def test_logit_scale_that_is_none(tmp_path, written):
    file = write(tmp_path / "toy.safetensors", {"class_names": json.dumps(NAMES), "logit_scale": written})
    assert_refused(file, "metadata logit_scale: must be", "; store the factor on cosines", "(CLIP's is 100)")


@pytest.mark.parametrize("written", ["a\x1b[2Jb", "a\nb", "\u202eb", "x" * 501])
def test_name_of_a_model_that_is_none(tmp_path, written):
    file = write(tmp_path / "toy.safetensors", {"class_names": json.dumps(NAMES), "backbone": written})
    assert_refused(file, "metadata backbone: ", "; store the name of the model that made the embeddings under 'model'")


def test_metadata_that_nobody_asks_for_is_passed_over(tmp_path):
    file = write(tmp_path / "toy.safetensors", {"class_names": json.dumps(NAMES), "embedded": "[" * 50_000, "dim": "x"})
    assert features_dataset(file).classes == tuple(NAMES)


# --- writing ---


def test_what_is_written_is_read(tmp_path):
    values = {name: value.numpy() for name, value in tensors().items()} | {
        "text_features": np.eye(3, 4, dtype=np.float16)
    }
    file = tmp_path / "toy.safetensors"
    save_features(file, **values, class_names=NAMES, templates=["a {}"], logit_scale=14.3, model="M")
    data = features_dataset(file)
    assert data.classes == tuple(NAMES)
    assert data.templates == ("a {}",)
    assert (data.embeddings.logit_scale, data.embeddings.name) == (14.3, "M")
    assert np.array_equal(data.embeddings.text, values["text_features"].astype(np.float32))
    for name in ("train", "test"):
        part = getattr(data, name)
        assert np.array_equal(part.values, values[f"{name}_features"])
        assert np.array_equal(part.labels, values[f"{name}_labels"])
    assert [found.name for found in tmp_path.iterdir()] == ["toy.safetensors"]


def test_any_memory_layout_is_written(tmp_path):
    rows = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    rows.flags.writeable = False
    labels = torch.arange(6)[::2] // 2  # strided, shared by both parts
    file = tmp_path / "toy.safetensors"
    save_features(
        file, train_features=rows, train_labels=labels, test_features=rows, test_labels=labels, class_names=NAMES
    )
    data = features_dataset(file)
    assert np.array_equal(data.train.values, rows)
    assert np.array_equal(data.test.values, rows)
    assert data.test.labels.tolist() == [0, 1, 2]


def test_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "toy.safetensors"
    with pytest.raises(DataError, match="differ in width"):
        save_features(file, **(tensors() | {"test_features": torch.zeros(6, 9)}), class_names=NAMES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"class_names": ["cat", "dog", "\ud800"]}, {"model": "\udcff"}, {"templates": ["\ud800 {}"]}]
)
def test_half_a_character_is_refused(tmp_path, changes):
    with pytest.raises(DataError, match=r"is not UTF-8: .*; leave that out") as error:
        save_features(tmp_path / "toy.safetensors", **tensors(), **({"class_names": NAMES} | changes))
    str(error.value).encode()
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_no_file_holds_is_refused(tmp_path):
    values = tensors() | {"test_features": torch.zeros(6, 4, dtype=torch.float8_e5m2)}
    with pytest.raises(DataError, match="test_features of float8_e5m2; store float32"):
        save_features(tmp_path / "toy.safetensors", **values, class_names=NAMES)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int8])
def test_labels_of_any_width_are_written(tmp_path, dtype):
    values = {name: value.numpy() for name, value in tensors().items()}
    values |= {name: values[name].astype(dtype) for name in ("train_labels", "test_labels")}
    save_features(tmp_path / "toy.safetensors", **values, class_names=NAMES)
    assert np.array_equal(features_dataset(tmp_path / "toy.safetensors").train.labels, values["train_labels"])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "toy.safetensors"
    save_features(file, **tensors(), class_names=NAMES)
    before = file.read_bytes()

    def full_disk(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(
        ResultError, match=r"toy\.safetensors': cannot be written: No space left on device; free some space"
    ):
        save_features(file, **tensors(), class_names=NAMES)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


# --- real files ---


@pytest.mark.skipif(not REAL.is_dir(), reason="the CLIP features beside the project are absent")
@pytest.mark.parametrize(
    ("name", "classes", "sizes", "texts"), [("ucf101", 101, (1616, 3783), False), ("caltech51", 51, (816, 1586), True)]
)
def test_real_features(name, classes, sizes, texts):
    data = features_dataset(REAL / f"{name}.safetensors")
    assert len(data.classes) == classes
    assert (len(data.train), len(data.test)) == sizes
    assert data.embeddings.dim == 512
    assert data.embeddings.name == "OpenAI CLIP ViT-B/32"
    assert (data.embeddings.text is not None) == texts
    assert data.templates == (("a {}",) if texts else ("a photo of a {}.",))
    assert abs(np.linalg.norm(data.train[0]) - 1) < 1e-2
