"""The CLIP towers against transformers' own forward passes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from cairn.data.templates import filled, spoken
from cairn.errors import CairnError, ConfigError, TowersError, UnknownName
from cairn.towers.catalogue import load_towers
from cairn.towers.openclip import open_clip_state
from cairn.towers.preprocessing import Preprocessing
from cairn.towers.protocol import Towers


def stock(towers):
    return towers._model


def ids_of(towers, prompts):
    rows = [[towers.bos, *towers.tokens(p), towers.eos] for p in prompts]
    longest = towers.context_length  # the plain way: every sequence at full length
    return torch.tensor([row + [1] * (longest - len(row)) for row in rows])


PROMPTS = ["a photo of a striped red star.", "a star", "we can see a plain blue circle on grass."]


def test_tiny_is_what_the_protocol_asks_for(towers):
    assert isinstance(towers, Towers)
    assert towers.dim == stock(towers).config.projection_dim
    assert 5 < towers.logit_scale <= 100.1


def test_text_is_the_stock_forward_although_cut_at_the_last_end(towers):
    ids = ids_of(towers, PROMPTS)
    with torch.no_grad():
        expected = stock(towers).get_text_features(ids).pooler_output
    torch.testing.assert_close(towers.text(PROMPTS), expected, atol=1e-5, rtol=1e-5)


def test_image_is_the_stock_forward(towers):
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(towers).get_image_features(pixels).pooler_output
    torch.testing.assert_close(towers.image(pixels), expected, atol=1e-5, rtol=1e-5)


def test_one_pass_gives_the_image_and_its_patches(towers):
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for attention in ("native", "value"):
        before = towers.passes["images"]
        image, patches = towers.image_and_patches(pixels, attention)
        assert towers.passes["images"] - before == 3
        torch.testing.assert_close(image, towers.image(pixels), atol=1e-6, rtol=1e-6)
        assert patches.shape == (3, 49, towers.dim)
    assert not stock(towers).vision_model.encoder.layers[-1]._forward_pre_hooks


def test_value_attention_is_the_last_block_with_values_for_queries_and_keys(towers):
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    tower = stock(towers).vision_model
    with torch.no_grad():
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for block in tower.encoder.layers[:-1]:
            x = block(x, None)
        block, heads = tower.encoder.layers[-1], tower.config.num_attention_heads
        normed = block.layer_norm1(x)
        v = block.self_attn.v_proj(normed).view(2, 50, heads, -1)
        mixed = torch.empty_like(v)
        for h in range(heads):
            for i in range(2):
                w = torch.softmax(v[i, :, h] @ v[i, :, h].T / v.shape[-1] ** 0.5, dim=-1)
                mixed[i, :, h] = w @ v[i, :, h]
        x = x + block.self_attn.out_proj(mixed.reshape(2, 50, -1))
        x = x + block.mlp(block.layer_norm2(x))
        expected = stock(towers).visual_projection(tower.post_layernorm(x[:, 1:]))
    torch.testing.assert_close(towers.image_and_patches(pixels, "value")[1], expected, atol=1e-5, rtol=1e-5)


def test_patches_go_through_final_norm_and_projection(towers):
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    model = stock(towers)
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=pixels).last_hidden_state
        expected = model.visual_projection(model.vision_model.post_layernorm(hidden))
    got = towers.patches(pixels)
    assert got.shape == (2, 49, towers.dim)
    torch.testing.assert_close(got, expected[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(towers.image(pixels), expected[:, 0], atol=1e-5, rtol=1e-5)


def test_passes_count_images_and_tokens(towers):
    before = dict(towers.passes)
    towers.image(torch.zeros(5, 3, 56, 56))
    towers.vision()(torch.zeros(2, 3, 56, 56))
    towers.text(["a star", "a ring"])
    longest = len(towers.tokens("a star")) + 2
    assert towers.passes["images"] - before["images"] == 7
    assert towers.passes["text_tokens"] - before["text_tokens"] == 2 * longest


def test_class_texts_average_unit_embeddings_over_templates(towers):
    templates = ("a photo of a {}.", "a drawing of a {}.")
    rows = towers.text(["a photo of a red star.", "a drawing of a red star."])
    expected = torch.nn.functional.normalize(torch.nn.functional.normalize(rows, dim=-1).mean(0), dim=-1)
    torch.testing.assert_close(towers.class_texts(["red_star"], templates)[0], expected)


def test_names_are_spoken_and_braces_stay():
    assert spoken("aquarium_fish") == "aquarium fish"
    assert filled("a photo of a {}.", "odd {name}") == "a photo of a odd {name}."


def test_a_prompt_that_does_not_fit_is_named(towers):
    with pytest.raises(TowersError, match=r"star star.*tokens, but the text tower takes 32; shorten"):
        towers.text(["star " * 40])


def test_bfloat16_stays_near_float32_and_hands_out_float32(towers):
    reduced = load_towers("tiny", device="cpu", precision="bfloat16")
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for full, half in ((towers.image(pixels), reduced.image(pixels)), (towers.text(PROMPTS), reduced.text(PROMPTS))):
        assert half.dtype == torch.float32
        assert torch.cosine_similarity(full, half).min() > 0.995
    assert reduced.fingerprint == towers.fingerprint


def test_a_trainable_copy_leaves_the_towers_alone(towers):
    vision = towers.vision().requires_grad_(True)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    before = towers.image(pixels)
    torch.testing.assert_close(vision(pixels), before)
    vision(pixels).sum().backward()
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.sub_(0.1 * (parameter.grad if parameter.grad is not None else 0))
    assert not torch.allclose(vision(pixels), before)
    assert torch.equal(towers.image(pixels), before)


# --- preprocessing --------------------------------------------------------------------------------------------------


def picture(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(80, 60), (60, 97), (56, 56), (30, 20)])
def test_crop_is_clip_s_own_preprocessing(width, height):
    image = picture(width, height)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    ours = Preprocessing(size=56)
    got = ours.pixels(ours.prepare(image)[None])[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_squash_keeps_the_whole_picture():
    image = Image.new("RGB", (100, 50), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 50))  # a white band that a centre crop would lose
    squashed = Preprocessing(size=20, mode="squash").prepare(image)
    cropped = Preprocessing(size=20).prepare(image)
    assert squashed[:, :, 0].min() > 200
    assert cropped.max() == 0


def test_gray_and_alpha_become_three_channels():
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert Preprocessing(size=16).prepare(Image.new(mode, (20, 20))).shape == (3, 16, 16)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """The tiny towers as a user's own folder."""
    from importlib import resources

    folder = tmp_path / "mine"
    shutil.copytree(str(resources.files("cairn.towers").joinpath("tiny")), folder)
    return folder


def test_a_local_folder_equals_what_it_was_copied_from(copy, towers):
    assert load_towers(str(copy), device="cpu").fingerprint == towers.fingerprint


def test_the_fingerprint_sees_weights_activation_and_preprocessing(copy, towers):
    seen = {towers.fingerprint, load_towers("tiny", device="cpu", preprocess="squash").fingerprint}
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "quick_gelu"
    (copy / "config.json").write_text(json.dumps(config))
    seen.add(load_towers(str(copy), device="cpu").fingerprint)
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].clone()
    weights["visual_projection.weight"][0, 0] += 0.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    seen.add(load_towers(str(copy), device="cpu").fingerprint)
    assert len(seen) == 4


def test_missing_weights_are_an_error(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TowersError, match=r"missing: 1 weight, first 'text_projection\.weight'"):
        load_towers(str(copy), device="cpu")


def test_damaged_files_are_one_line(copy):
    (copy / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(TowersError) as caught:
        load_towers(str(copy), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("tinny", UnknownName, "did you mean tiny"),
        ("./nowhere/clip", TowersError, "no such folder"),
        ("somebody/no-such-clip", TowersError, "cannot be fetched from the hub"),
    ],
)
def test_unknown_towers(spec, error, says):
    with pytest.raises(error, match=says):
        load_towers(spec, device="cpu")


def test_unknown_device_and_precision():
    with pytest.raises(ConfigError, match="device 'abacus'"):
        load_towers("tiny", device="abacus")
    with pytest.raises(CairnError, match="precision 'float8'"):
        load_towers("tiny", device="cpu", precision="float8")


def test_vit_b16_in_both_layouts_gives_the_same_towers(tmp_path, towers):
    """A full-size ViT-B/16 of random weights, once in the transformers and once in the open_clip layout."""
    text = {"vocab_size": towers._model.config.text_config.vocab_size, "hidden_act": "gelu"}
    text |= {"bos_token_id": towers.bos, "eos_token_id": towers.eos, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 16, "hidden_act": "gelu"}, projection_dim=512)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    theirs, ours = tmp_path / "transformers", tmp_path / "open_clip"
    model.save_pretrained(theirs)
    towers.tokenizer.save_pretrained(theirs)
    towers.tokenizer.save_pretrained(ours)
    state = {key: value.contiguous() for key, value in open_clip_state(model.state_dict()).items()}
    save_file(state, ours / "open_clip_model.safetensors")
    side = {"embed_dim": 512, "quick_gelu": False}
    side["vision_cfg"] = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    side["text_cfg"] = {"context_length": 77, "vocab_size": text["vocab_size"], "width": 512, "heads": 8, "layers": 12}
    (ours / "open_clip_config.json").write_text(json.dumps({"model_cfg": side, "preprocess_cfg": {}}))

    a, b = load_towers(str(theirs), device="cpu"), load_towers(f"open_clip:{ours}", device="cpu")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(a.image(pixels), b.image(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.text(PROMPTS), b.text(PROMPTS), atol=1e-5, rtol=0)
    assert a.image(pixels).std() > 1e-3
    assert a.text(PROMPTS).std() > 1e-3
