"""What a checkpoint on disk may hold, and what it may not."""

from __future__ import annotations

import json
import shutil
from importlib import resources

import pytest
from safetensors.torch import load_file, save_file

from cairn.errors import TowersError
from cairn.towers.catalogue import load_towers
from cairn.towers.openclip import open_clip_state


@pytest.fixture
def folder(tmp_path):
    """The tiny towers as a user's own folder."""
    copy = tmp_path / "mine"
    shutil.copytree(str(resources.files("cairn.towers").joinpath("tiny")), copy)
    return copy


@pytest.fixture
def weights(folder):
    """Those of the folder, in float32."""
    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}


def write(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- numbers that are none --------------------------------------------------------------------------------------------

SPOILED = {
    "nan": ("vision_model.encoder.layers.0.mlp.fc1.weight", float("nan")),
    "infinite": ("text_projection.weight", float("inf")),
    "logit scale": ("logit_scale", 1000.0),
}


@pytest.mark.parametrize(("name", "value"), SPOILED.values(), ids=SPOILED)
def test_weights_that_are_not_finite_are_refused(name, value, folder, weights):
    """exp(1000) is beyond float32."""
    weights[name].view(-1)[0] = value
    write(folder, weights)
    shown = "exp(logit_scale)" if name == "logit_scale" else name
    with pytest.raises(TowersError) as caught:
        load_towers(str(folder), device="cpu")
    assert f"towers '{folder}': 1 weights hold values that are not finite, first '{shown}'" in str(caught.value)


def test_so_are_those_of_open_clip(folder, weights, towers):
    weights["visual_projection.weight"][0, 0] = float("nan")
    state = {name: value.contiguous() for name, value in open_clip_state(weights).items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    with pytest.raises(TowersError, match=r"not finite, first 'visual_projection\.weight'"):
        load_towers(f"open_clip:{folder}", device="cpu")


OPEN_CLIP = {
    "embed_dim": 160,
    "vision_cfg": {"image_size": 56, "layers": 6, "width": 160, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 784, "width": 128, "heads": 4, "layers": 3},
}
"""The tiny towers as open_clip describes them."""
