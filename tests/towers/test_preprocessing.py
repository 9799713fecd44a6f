"""What a checkpoint's files say of preprocessing, field by field, against transformers' own processor on odd sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from cairn.errors import ConfigError, TowersError
from cairn.towers.catalogue import load_towers
from cairn.towers.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    open_clip_preprocessing,
    processor_preprocessing,
)

SIZE = 48
PLAIN = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
SHAPES = ((80, 60), (61, 97), (SIZE, SIZE), (31, 20), (7, 9), (203, 33), (57, 48))


def picture(width, height):
    """Smooth, so that every filter and every shift by a pixel shows."""
    rng = np.random.default_rng(width * height)
    noise = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


def stored(folder, fields, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def prepared(preprocessing, image):
    return preprocessing.pixels(preprocessing.prepare(image)[None])[0]


FIELDS = {
    "nothing": {},
    "mean and std": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]},
    "one mean for all": {"image_mean": 0.5, "image_std": 0.5},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "another factor": {"rescale_factor": 1 / 127.5},
    "neither": {"do_rescale": False, "do_normalize": False},
    "resized to more": {"size": {"shortest_edge": 56}},
    "resized to less": {"size": {"shortest_edge": 37}},
    "a number for a size": {"size": 56, "crop_size": SIZE},
    "squashed": {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
    "squashed, then cut": {"size": {"height": 61, "width": 61}},
    "cut alone": {"do_resize": False},
    "not converted": {"do_convert_rgb": False},
    "null": {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": None, "do_normalize": None, "do_pad": None},
    **{f"resample {number}": {"resample": number} for number in range(6)},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_every_field_is_that_of_the_models_own_processor(tmp_path, fields):
    theirs = CLIPImageProcessorPil(**PLAIN | fields)
    ours = processor_preprocessing(stored(tmp_path, PLAIN | fields), SIZE)
    for shape in SHAPES:
        image = picture(*shape)
        expected = theirs(image, return_tensors="pt")["pixel_values"][0].float()
        torch.testing.assert_close(prepared(ours, image), expected, atol=1e-5, rtol=1e-5)


def test_what_transformers_itself_saves_is_understood(tmp_path, towers):
    """Version 5 writes `processor_config.json`, which counts before the older file beside it."""
    from transformers import CLIPProcessor

    theirs = CLIPImageProcessorPil(**PLAIN, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    CLIPProcessor(theirs, towers.tokenizer).save_pretrained(tmp_path / "five")
    theirs.save_pretrained(tmp_path / "four")
    expected = Preprocessing(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    for name in ("five", "four"):
        assert processor_preprocessing(tmp_path / name, SIZE) == expected
    assert (tmp_path / "five" / "processor_config.json").is_file()
    stored(tmp_path / "five", PLAIN)
    assert processor_preprocessing(tmp_path / "five", SIZE) == expected
    stored(tmp_path / "five", {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert processor_preprocessing(tmp_path / "five", SIZE) == Preprocessing(size=SIZE)


def test_embeddings_are_those_of_the_model_with_its_own_processor(copy):
    fields = {
        "size": {"shortest_edge": 66},
        "crop_size": {"height": 56, "width": 56},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 2,
    }
    stored(copy, {"image_processor": fields}, "processor_config.json")
    towers = load_towers(str(copy), device="cpu")
    image = picture(91, 64)
    pixels = CLIPImageProcessorPil(**fields)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = towers._model.get_image_features(pixels).pooler_output
    got = towers.image(towers.pixels(towers.prepare(image)[None]))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.cosine_similarity(got, load_towers("tiny", device="cpu").image(pixels * 0.9)).item() < 0.9999


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"do_center_crop": False}, "do_center_crop false: images would not become squares"),
        ({"do_center_crop": False, "do_resize": False}, "do_center_crop false"),
        ({"size": {"height": 60, "width": 60}, "do_center_crop": False}, "is not cut"),
        ({"size": {"shortest_edge": 48, "longest_edge": 60}}, "longest_edge"),
        ({"size": {"max_height": 48, "max_width": 48}}, "max_height"),
        ({"size": {"height": 48, "width": 60}}, "'width': 60"),
        ({"size": 0}, "size 0"),
        ({"size": "big"}, "size"),
        ({"crop_size": 40}, "crop_size 40: the image tower takes 48 x 48"),
        ({"crop_size": {"height": 48, "width": 40}}, "crop_size"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 9}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"image_std": 0}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": None}, "image_mean"),
        ({"resample": None}, "resample"),
        ({"do_normalize": "false"}, "do_normalize"),
        ({"sharpen": 2}, "unknown key 'sharpen'"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"data_format": "channels_last"}, "data_format"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, fields, says):
    folder = stored(tmp_path, PLAIN | fields)
    with pytest.raises(TowersError) as caught:
        processor_preprocessing(folder, SIZE)
    assert says in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"image_processor": 3}', "[" * 100_000])
def test_a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(TowersError, match=r"processor_config\.json"):
        processor_preprocessing(tmp_path, SIZE)


# --- open_clip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_open_clips_longest_side_with_its_fill(shape):
    """By its definition: the longer side to the size, what is missing above and left the smaller half."""
    ours = open_clip_preprocessing({"resize_mode": "longest", "fill_color": 7, "interpolation": "bilinear"}, SIZE, "x")
    image = picture(*shape)
    ratio = max(shape) / SIZE
    width, height = (round(side / ratio) for side in shape)
    expected = np.full((SIZE, SIZE, 3), 7, np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    expected[top : top + height, left : left + width] = resized
    np.testing.assert_array_equal(ours.prepare(image).permute(1, 2, 0).numpy(), expected)


def test_open_clips_fields_are_honoured():
    said = {
        "size": 224,
        "mode": "RGB",
        "mean": 0.5,
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 0,
    }
    expected = Preprocessing(size=SIZE, mean=(0.5,) * 3, std=(0.2, 0.3, 0.4), mode="squash", resample="bilinear")
    assert open_clip_preprocessing(said, SIZE, "x") == expected
    for plain in ({}, {"mean": None, "resize_mode": None, "interpolation": "random"}):
        assert open_clip_preprocessing(plain, SIZE, "x") == Preprocessing(size=SIZE, mean=CLIP_MEAN, std=CLIP_STD)


@pytest.mark.parametrize(
    "fields",
    [{"interpolation": "lanczos"}, {"resize_mode": "middle"}, {"mean": "x"}, {"std": 0}, {"mode": "L"}, {"fill_color": 300},
     {"sharpen": 1}],
)  # fmt: skip
def test_open_clips_unknown_values_are_refused_by_name(fields):
    with pytest.raises(TowersError, match=f"here: .*{next(iter(fields))}"):
        open_clip_preprocessing(fields, SIZE, "here")


# --- what is asked for --------------------------------------------------------------------------------------------------


def test_unset_is_as_the_checkpoint_says(open_clip_copy):
    path = open_clip_copy / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess_cfg": {"resize_mode": "squash"}}))
    modes = {
        asked: load_towers(f"open_clip:{open_clip_copy}", device="cpu", preprocess=asked).preprocessing.mode
        for asked in (None, "crop", "squash")
    }
    assert modes == {None: "squash", "crop": "crop", "squash": "squash"}


def test_another_mode_leaves_the_checkpoints_side_behind():
    own = Preprocessing(size=SIZE, edge=56)
    assert own.with_mode(None) == own.with_mode("crop") == own
    assert own.with_mode("squash") == Preprocessing(size=SIZE, mode="squash")


@pytest.mark.parametrize("asked", ["fold", "pad", "keep", ""])
def test_what_is_no_way_to_a_square_is_refused(asked):
    with pytest.raises(ConfigError, match=f"preprocess '{asked}': must be crop or squash"):
        load_towers("tiny", device="cpu", preprocess=asked)


def test_nobody_asks_for_a_crop_by_default(towers):
    from cairn import IncrementalClassifier
    from cairn.embed.plan import EmbedConfig
    from cairn.experiment.schema import RunConfig

    assert RunConfig(method="dmc").preprocess is None
    assert EmbedConfig().preprocess is None
    assert IncrementalClassifier("dmc").preprocess is None


def test_the_fingerprint_of_what_older_versions_knew_is_theirs(towers):
    """The text that is hashed has later fields where they are not neutral, and nowhere else."""
    older = (
        '{"size":56,"mean":[0.48145466,0.4578275,0.40821073],"std":[0.26862954,0.26130258,0.27577711],'
        '"mode":"crop","resample":"bicubic"}'
    )
    assert Preprocessing(size=56).identity() == older
    changed = [Preprocessing(size=56, **{key: 7}).identity() for key in ("edge", "rescale", "fill")]
    changed.append(Preprocessing(size=56, decode="reduced").identity())
    assert len({older, *changed}) == 5


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_a_reduced_jpeg_leaves_the_resize_twice_what_it_makes(mode):
    whole = Preprocessing(size=SIZE, mode=mode)
    assert whole.decoded_side is None
    assert whole.with_decoding("whole") is whole
    assert whole.with_decoding("reduced").decoded_side == 2 * SIZE
    assert Preprocessing(size=SIZE, mode=mode, edge=56).with_decoding("reduced").decoded_side == 112
    assert whole.with_decoding("reduced").with_mode("squash").decode == "reduced"


def test_decoding_is_whole_unless_asked_for_and_refused_where_nothing_is_resized():
    from cairn import IncrementalClassifier
    from cairn.embed.plan import EmbedConfig
    from cairn.experiment.schema import RunConfig

    assert {RunConfig(method="dmc").decode, EmbedConfig().decode, IncrementalClassifier("dmc").decode} == {"whole"}
    with pytest.raises(ConfigError, match="without being resized; leave it out"):
        Preprocessing(size=SIZE, mode="keep").with_decoding("reduced")
    with pytest.raises(ConfigError, match="decode 'half': must be whole or reduced"):
        load_towers("tiny", device="cpu", decode="half")
    assert (
        load_towers("tiny", device="cpu").fingerprint != load_towers("tiny", device="cpu", decode="reduced").fingerprint
    )
