"""What a checkpoint on disk may hold, and what it may not."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from cairn.errors import TowersError
from cairn.towers.catalogue import load_towers


@pytest.fixture
def weights(copy):
    """Those of the copy, in float32."""
    return {name: value.float() for name, value in load_file(copy / "model.safetensors").items()}


def write(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- numbers that are none --------------------------------------------------------------------------------------------

SPOILED = {
    "nan": ("vision_model.encoder.layers.0.mlp.fc1.weight", float("nan")),
    "infinite": ("text_projection.weight", float("inf")),
    "logit scale": ("logit_scale", 1000.0),
}


@pytest.mark.parametrize(("name", "value"), SPOILED.values(), ids=SPOILED)
def test_weights_that_are_not_finite_are_refused(name, value, copy, weights):
    """exp(1000) is beyond float32."""
    weights[name].view(-1)[0] = value
    write(copy, weights)
    shown = "exp(logit_scale)" if name == "logit_scale" else name
    with pytest.raises(TowersError) as caught:
        load_towers(str(copy), device="cpu")
    assert f"towers '{copy}': not finite in 1 weight, first '{shown}'" in str(caught.value)


def test_so_are_those_of_open_clip(open_clip_copy):
    path = open_clip_copy / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, path)
    with pytest.raises(TowersError, match=r"not finite in 1 weight, first 'visual_projection\.weight'"):
        load_towers(f"open_clip:{open_clip_copy}", device="cpu")


# --- names and shapes -------------------------------------------------------------------------------------------------

PREFIXES = ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod.", "clip."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off_and_named(prefix, copy, weights, towers):
    write(copy, {f"{prefix}{name}": value for name, value in weights.items()})
    found = load_towers(str(copy), device="cpu")
    assert found.fingerprint == towers.fingerprint
    assert found.notices == (f"'{copy}': names of weights begin with '{prefix}', which is left out",)
    assert towers.notices == ()


def test_a_tower_that_was_compiled_alone_is_read(copy, weights, towers):
    write(copy, {name.replace("vision_model.", "vision_model._orig_mod."): v for name, v in weights.items()})
    assert load_towers(str(copy), device="cpu").fingerprint == towers.fingerprint


def test_prefixes_of_open_clip_are_taken_off_too(open_clip_copy, towers):
    path = open_clip_copy / "open_clip_model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path)
    found = load_towers(f"open_clip:{open_clip_copy}", device="cpu")
    assert found.fingerprint == towers.fingerprint
    assert "begin with 'module.'" in found.notices[0]


def test_one_name_with_and_without_a_prefix_is_refused(copy, weights):
    write(copy, weights | {"module.logit_scale": torch.tensor(1.0)})
    with pytest.raises(TowersError, match=r"logit_scale' is there twice, with and without a prefix"):
        load_towers(str(copy), device="cpu")


def test_shapes_that_do_not_fit_are_named(copy, weights):
    write(copy, weights | {"visual_projection.weight": torch.ones(160, 128)})
    with pytest.raises(
        TowersError, match=r"1 weight: 'visual_projection\.weight' is \(160, 128\), by config\.json \(160, 160\)"
    ):
        load_towers(str(copy), device="cpu")


def test_layers_that_the_config_has_not_are_not_passed_over(copy, weights):
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(TowersError, match=r"16 weights: 'vision_model\.encoder\.layers\.5.* by config\.json absent"):
        load_towers(str(copy), device="cpu")


def test_a_head_beside_the_towers_is_left_out_aloud(copy, weights, towers):
    write(copy, weights | {"classifier.weight": torch.ones(3, 160)})
    found = load_towers(str(copy), device="cpu")
    assert found.fingerprint == towers.fingerprint
    assert found.notices == (f"'{copy}': left out, without a place in the model: 1 tensor, first 'classifier.weight'",)


def test_weights_in_parts_are_read(copy, weights, towers):
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, copy / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_towers(str(copy), device="cpu").fingerprint == towers.fingerprint
    index["weight_map"]["logit_scale"] = "../model.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TowersError, match="no index of weights"):
        load_towers(str(copy), device="cpu")


def test_towers_draw_nothing_at_random(copy):
    generator = torch.get_rng_state()
    load_towers(str(copy), device="cpu")
    assert torch.equal(generator, torch.get_rng_state())


# --- a LoRA that is there already -------------------------------------------------------------------------------------


@pytest.fixture
def tuned(copy):
    """A LoRA on the copy's model, as training leaves it: B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(copy, dtype=torch.float32, use_safetensors=True)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "fc1"], rank_pattern={"fc1": 2})
    config.base_model_name_or_path = str(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft calls of transformers
        tuned = get_peft_model(model, config)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    return tuned


@pytest.fixture
def merged(tuned, copy, tmp_path):
    """Fingerprint and embeddings of the model that peft itself merges, saved on its own."""
    import shutil
    from copy import deepcopy

    shutil.copytree(copy, tmp_path / "merged")
    deepcopy(tuned).merge_and_unload().save_pretrained(tmp_path / "merged")
    return load_towers(str(tmp_path / "merged"), device="cpu")


def test_a_lora_beside_the_weights_is_merged(tuned, merged, copy, towers):
    tuned.save_pretrained(copy)
    found = load_towers(str(copy), device="cpu")
    assert found.fingerprint == merged.fingerprint != towers.fingerprint
    assert found.notices == (f"'{copy}': its LoRA is merged into the weights",)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tuned.base_model.model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found.image(pixels), expected, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in found.vision().named_modules())


def test_a_lora_alone_is_merged_into_the_model_that_it_names(tuned, merged, tmp_path):
    tuned.save_pretrained(tmp_path / "adapter")
    assert load_towers(str(tmp_path / "adapter"), device="cpu").fingerprint == merged.fingerprint


def test_so_is_one_whose_model_the_hub_holds(tuned, merged, copy, tmp_path, hub):
    hub.holds("someone/clip", copy)
    tuned.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(copy), "someone/clip"))
    hub.holds("someone/adapter", tmp_path / "adapter")
    found = load_towers("someone/adapter", device="cpu")
    assert found.fingerprint == merged.fingerprint
    assert found.revision == hub.commit("someone/adapter", "main")
    hub.disconnect()
    assert load_towers("someone/adapter", device="cpu").fingerprint == merged.fingerprint
    assert hub.asked == []


def test_a_lora_of_a_method_starts_from_the_merged_towers(tuned, merged, copy):
    """B is zero at first, so attaching changes nothing."""
    from cairn.towers.tuning import ImageEncoder, Lora

    tuned.save_pretrained(copy)
    encoder = ImageEncoder(load_towers(str(copy), device="cpu"), Lora(), torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with encoder.inference():
        torch.testing.assert_close(encoder(pixels), merged.image(pixels), atol=1e-6, rtol=0)


def test_adapters_that_do_not_fit_are_refused(tuned, copy, weights, tmp_path):
    adapter = tmp_path / "adapter"
    tuned.save_pretrained(adapter)
    state = load_file(adapter / "adapter_model.safetensors")
    first = sorted(state)[0]
    lacking = {name: value for name, value in state.items() if name != first}
    narrow = state | {first: state[first][:, :3].contiguous()}
    changes = {
        "the adapter does not fit the model: it has nothing for 1 tensor": lacking,
        "the adapter does not fit the model: it has too much with 1 tensor": state
        | {"x.lora_A.weight": state[first].clone()},
        "size mismatch for": narrow,
    }
    for message, changed in changes.items():
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(TowersError, match=message):
            load_towers(str(adapter), device="cpu")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(TowersError, match=r"adapter_model\.bin: pickled weights are not read"):
        load_towers(str(adapter), device="cpu")
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(TowersError, match="only LoRA is merged on loading; merge it"):
        load_towers(str(adapter), device="cpu")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(TowersError, match="names no base model"):
        load_towers(str(adapter), device="cpu")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "use_later": true, "later": null}')
    with pytest.raises(TowersError, match="use_later is not known"):
        load_towers(str(adapter), device="cpu")


def test_layers_of_a_lora_among_the_weights_are_refused(tuned, copy):
    """Their scale stands nowhere."""
    write(copy, {name: value.contiguous() for name, value in tuned.state_dict().items()})
    with pytest.raises(TowersError, match=r"holds \d+ tensors of LoRA layers, first .*merge_and_unload"):
        load_towers(str(copy), device="cpu")


def test_a_model_in_memory_that_carries_a_lora_is_refused(tuned, towers):
    from cairn.towers.clip import ClipTowers

    with pytest.raises(TowersError, match=r"towers 'mine': carries an adapter of peft on \d+ layers.*merge_and_unload"):
        ClipTowers(tuned.base_model.model, towers.tokenizer, towers.preprocessing, name="mine", device="cpu")


# --- where a checkpoint lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["./no/where", "no/where/at/all", "/no/where", "~/no-where-at-all", "no where/x", "no\\where/x"]
)
def test_a_path_that_is_not_there_is_told_and_not_tried_on_the_hub(path, hub):
    for spec in (path, f"open_clip:{path}"):
        with pytest.raises(TowersError, match="no such folder"):
            load_towers(spec, device="cpu")
    assert hub.asked == []


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_cached_copy_is_taken_without_the_hub(revision, copy, towers, hub):
    hub.holds("someone/clip", copy, revision or "main")
    first = load_towers("someone/clip", device="cpu", revision=revision)
    assert first.fingerprint == towers.fingerprint
    assert first.revision == hub.commit("someone/clip", revision or "main")
    hub.disconnect()
    for pinned in (revision, first.revision):
        assert load_towers("someone/clip", device="cpu", revision=pinned).fingerprint == towers.fingerprint
    assert hub.asked == []
    with pytest.raises(
        TowersError, match=r"'someone/clip' is no folder, not in the cache, and cannot be fetched.*not known"
    ):
        load_towers("someone/clip", device="cpu", revision="other")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_copy_that_lacks_something_is_completed(name, copy, towers, hub):
    """Without the preprocessing's file the hub is asked whether there is one: CLIP's own would be a silent wrong answer."""
    hub.holds("someone/clip", copy)
    place = load_towers("someone/clip", device="cpu")
    (file,) = hub.cache.rglob(name)
    file.unlink()
    assert load_towers("someone/clip", device="cpu").fingerprint == place.fingerprint
    (file,) = hub.cache.rglob(name)
    file.unlink()
    hub.disconnect()
    with pytest.raises(TowersError, match="cannot be fetched from the hub"):
        load_towers("someone/clip", device="cpu")


def test_pickled_weights_are_taken_from_the_hub_s_own_conversion(copy, towers, hub, monkeypatch, tmp_path):
    """The commit that is kept is that of the conversion: with it the same weights are found again."""
    import shutil

    from transformers import safetensors_conversion

    shutil.copytree(copy, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    hub.holds("someone/clip", tmp_path / "pickled")
    hub.holds("someone/clip", copy, "refs/pr/7")
    monkeypatch.setattr(safetensors_conversion, "get_conversion_pr_reference", lambda api, name: "refs/pr/7")
    found = load_towers("someone/clip", device="cpu")
    assert found.revision == hub.commit("someone/clip", "refs/pr/7")
    hub.disconnect()
    assert load_towers("someone/clip", device="cpu", revision=found.revision).fingerprint == towers.fingerprint
