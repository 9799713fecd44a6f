"""The drawn world: deterministic, apart from pre-training, masks that mean what they say, frozen by its hash."""

from __future__ import annotations

import numpy as np
import pytest

from cairn.data import shapes
from cairn.data.shapes import PLAIN, SHIFTED, Scene, caption, class_name, compositions, draw, shapes_dataset


def scene(**changes):
    return Scene(**({"shape": 3, "colour": 0, "texture": 1, "background": 0, "seed": 5} | changes))


def test_the_world_is_frozen():
    assert shapes.world_hash() == shapes.WORLD_HASH


def test_a_drawing_is_a_pure_function_of_its_scene():
    np.random.seed(0)  # noqa: NPY002
    first = draw(scene(), SHIFTED)
    again = draw(scene(), SHIFTED)
    assert first.pixels.shape == (shapes.SIZE, shapes.SIZE, 3)
    assert first.pixels.dtype == np.uint8
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.pixels, draw(scene(seed=6), SHIFTED).pixels)


@pytest.mark.parametrize("shape", range(len(shapes.SHAPES)))
def test_the_mask_is_where_the_colour_is(shape):
    """Inside the mask a plain red object is red, and it covers what an object should."""
    quiet = shapes.Style((14, 14), 0.2, (0, 0), (0, 0), 0.0, (0, 0), (1, 1, 1), 0.0, 0.0)
    red = draw(Scene(shape, 0, 0, 2, 11), quiet)
    red_pixels = red.pixels[red.mask].astype(int)
    assert 60 < red.mask.sum() < 0.35 * shapes.SIZE**2
    assert (red_pixels[:, 0] > red_pixels[:, 2] + 40).mean() > 0.95


def test_shapes_have_different_outlines():
    quiet = shapes.Style((16, 16), 0.0, (0, 0), (0, 0), 0.0, (0, 0), (1, 1, 1), 0.0, 0.0)
    masks = []
    for shape in range(len(shapes.SHAPES)):
        share, _, _ = shapes._coverage(shape, np.array([28.0, 28.0]), 16.0, 0.0, (slice(0, 56), slice(0, 56)))
        masks.append(share > 0.5)
    assert quiet.occlusion == 0
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.86


def test_the_stream_s_compositions_are_kept_from_pre_training():
    parts = {part: set(compositions(part)) for part in ("stream", "dev", "pretraining")}
    assert [len(parts[p]) for p in ("stream", "dev", "pretraining")] == [40, 40, 400]
    assert not parts["stream"] & parts["dev"]
    assert not (parts["stream"] | parts["dev"]) & parts["pretraining"]
    for kind, number in enumerate((12, 8, 5)):  # every attribute by itself was shown
        assert {c[kind] for c in parts["pretraining"]} == set(range(number))


def test_the_dataset_is_lazy_balanced_and_its_splits_share_no_scene():
    data = shapes_dataset()
    assert len(data.classes) == 40
    assert len(set(data.classes)) == 40
    assert np.bincount(data.train.labels).tolist() == [shapes.TRAIN_PER_CLASS] * 40
    assert np.bincount(data.test.labels).tolist() == [shapes.TEST_PER_CLASS] * 40
    assert not set(data.train.scenes) & set(data.test.scenes)
    assert not {s.seed for s in data.train.scenes} & {s.seed for s in shapes_dataset("dev").train.scenes}
    index = 777
    name = data.classes[data.train.labels[index]]
    assert data.train.scenes[index].name == name
    assert name in data.train.describe(index)
    assert data.train[index].shape == (56, 56, 3)
    assert data.train.mask(index).shape == (56, 56)


def test_captions_state_what_they_claim():
    rng = np.random.default_rng(0)
    partial = 0
    for seed in range(300):
        one = scene(shape=seed % 12, colour=seed % 8, texture=seed % 5, background=seed % 6, seed=seed)
        text, claim = caption(one, rng)
        facts = (one.shape, one.colour, one.texture, one.background)
        assert all(c in (-1, f) for c, f in zip(claim, facts, strict=True))
        assert (shapes.COLOURS[one.colour] in text.replace(".", "").split()) == (claim[1] != -1)
        assert (shapes.BACKGROUNDS[one.background] in text) == (claim[3] != -1)
        if claim[0] != -1:
            assert shapes.SHAPES[one.shape] in text or shapes.SHAPE_WORDS[one.shape] in text
        partial += -1 in claim[:3]
    assert 30 < partial < 270


def test_the_shifted_style_is_another_style():
    plain, shifted = (
        np.stack([draw(scene(seed=i), s).pixels for i in range(40)]).astype(float) for s in (PLAIN, SHIFTED)
    )
    assert shifted[..., 0].mean() < 0.9 * plain[..., 0].mean()


def test_names_are_words():
    assert class_name((3, 0, 1)) == "striped red star"


def test_an_image_is_its_scene_and_style():
    data = shapes_dataset()
    known = {data.train.identity(i) for i in range(0, 8000, 40)} | {data.test.identity(i) for i in range(0, 1000, 40)}
    assert len(known) == 225
    plain = shapes.ShapesImages(data.train.scenes, data.train.labels, PLAIN)
    assert plain.identity(0) != data.train.identity(0) == shapes_dataset().train.identity(0)
    assert shapes.WORLD_HASH.encode() in data.train.identity(0)
