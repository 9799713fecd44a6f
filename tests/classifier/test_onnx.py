"""The parts of an exported file: preprocessing in the graph, and scores as modules."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from cairn import IncrementalClassifier
from cairn.classifier.onnx import export_onnx, preprocessing_graph
from cairn.data.shapes import shapes_dataset
from cairn.errors import ConfigError
from cairn.towers.catalogue import load_towers
from cairn.towers.preprocessing import Preprocessing

SIZES = [(56, 56), (40, 97), (97, 40), (31, 31), (200, 133), (20, 400), (55, 57), (640, 480)]


def smooth(height, width, seed=0):
    """A picture with edges and slopes, as photographs have, and not noise alone."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"edge": 64},
        {"edge": 50},
        {"resample": "bilinear"},
        {"mode": "squash"},
        {"mode": "squash", "edge": 61},
        {"mode": "pad", "fill": 7},
        {"mode": "keep"},
        {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "rescale": 1 / 127.5},
    ],
    ids=str,
)
def test_preprocessing_in_the_graph_is_pillows_but_for_a_step_or_two(changes):
    how = Preprocessing(size=56, **changes)
    proto = preprocessing_graph(how)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for number, (height, width) in enumerate(SIZES):
        images = np.stack([smooth(height, width, 2 * number + i) for i in range(2)])
        found = np.asarray(session.run(None, {"images": images})[0])
        expected = how.pixels(torch.stack([how.prepare(image) for image in images])).numpy()
        assert found.shape == expected.shape
        steps = np.abs(found - expected) * np.array(how.std).reshape(1, 3, 1, 1) / how.rescale
        assert steps.max() <= 2.01, (height, width)
        assert steps.mean() < 0.2, (height, width)


def test_a_filter_that_onnx_lacks_is_refused():
    with pytest.raises(ConfigError, match="lanczos"):
        preprocessing_graph(Preprocessing(size=56, resample="lanczos"))


@pytest.fixture(scope="module")
def pictures():
    data = shapes_dataset()
    rows = [row for c, n in enumerate((9, 4, 6)) for row in np.flatnonzero(data.train.labels == c)[:n]]
    tests = [row for c in range(3) for row in np.flatnonzero(data.test.labels == c)[:8]]
    return (
        [data.train[i] for i in rows],
        [data.classes[data.train.labels[i]] for i in rows],
        [data.test[i] for i in tests],
    )


@pytest.fixture(scope="module")
def towers_once():
    return load_towers("tiny", device="cpu")


@pytest.fixture(scope="module")
def blend(pictures, towers_once):
    return IncrementalClassifier(towers=towers_once, device="cpu").partial_fit(*pictures[:2])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("blend", {}),
        ("blend", {"patches": "mean", "text": False}),
        ("blend", {"patches": "none", "features": 0, "rank": 0}),
        ("lda", {}),
        ("acil", {}),
        ("ranpac", {"width": 300}),
        ("ranpac", {"width": 0}),
    ],
    ids=str,
)
def test_heads_in_closed_form_are_exported_exactly(method, settings, pictures, tmp_path, towers_once):
    learner = IncrementalClassifier(method, towers_once, settings=settings, device="cpu").partial_fit(*pictures[:2])
    made = export_onnx(learner, tmp_path / "m.onnx", images=pictures[2])
    assert (made.images, made.agreement) == (24, 1.0)
    assert made.difference < 1e-4
    assert made.probability < 1e-3


@pytest.mark.parametrize(("form", "near"), [("float16", 0.01), ("int8", 0.2)])
def test_smaller_forms_say_how_far_they_are(form, near, blend, pictures, tmp_path):
    whole = export_onnx(blend, tmp_path / "m.onnx", images=pictures[2])
    made = export_onnx(blend, tmp_path / f"{form}.onnx", form=form, images=pictures[2])
    assert made.bytes == (tmp_path / f"{form}.onnx").stat().st_size < 0.8 * whole.bytes
    assert whole.probability < made.probability < near
    assert made.agreement > 0.9
    session = onnxruntime.InferenceSession(str(tmp_path / f"{form}.onnx"), providers=["CPUExecutionProvider"])
    pixels = torch.zeros(5, 3, 56, 56).numpy()  # another number than it was made with
    scores, probabilities = map(np.asarray, session.run(["scores", "probabilities"], {"pixels": pixels}))
    assert scores.shape == probabilities.shape == (5, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


def test_a_file_that_takes_images_answers_as_the_learner(blend, pictures, tmp_path):
    """Uint8 of any size, several of one size at once."""
    odd = [np.asarray(Image.fromarray(image).resize((71, 90))) for image in pictures[2]]
    made = export_onnx(blend, tmp_path / "m.onnx", images=odd, preprocessing=True)
    assert made.agreement == 1.0
    assert made.probability < 0.05
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    together = np.asarray(session.run(["probabilities"], {"images": np.stack(odd)})[0])
    np.testing.assert_allclose(together, blend.predict_proba(odd), atol=0.05)
