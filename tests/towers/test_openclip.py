import copy
import json
import math
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from cairn.errors import TowersError
from cairn.towers.openclip import clip_config, clip_state, open_clip_checkpoint, open_clip_state
from cairn.towers.preprocessing import Preprocessing

BASE = {
    "model_cfg": {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"},
}
# No two sizes agree, so that nothing fits by chance: 3 heads of 16 and 2 of 12, 9 patches, 7 tokens.
SMALL = {
    "model_cfg": {
        "embed_dim": 20,
        "vision_cfg": {
            "image_size": 12,
            "layers": 2,
            "width": 48,
            "patch_size": 4,
            "head_width": 16,
            "mlp_ratio": 2.5,
            "norm_kwargs": {"eps": 0.03},
        },
        "text_cfg": {"context_length": 7, "vocab_size": 50, "width": 24, "heads": 2, "layers": 3},
    },
}


def changed(config: dict, path: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *sections, key = path.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return config


def without(config: dict, path: str) -> dict:
    config = changed(config, path, None)
    *sections, key = path.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    del inner[key]
    return config


def small_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of SMALL under open_clip's names, every bias and norm away from its neutral value."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(shape, generator=rng)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(width, around=1.0), f"{name}.bias": draw(width)}

    def blocks(prefix: str, layers: int, width: int, hidden: int) -> dict[str, Tensor]:
        state = {}
        for name in (f"{prefix}.resblocks.{index}" for index in range(layers)):
            state |= norm(f"{name}.ln_1", width) | norm(f"{name}.ln_2", width)
            shapes = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
            shapes |= {"mlp.c_fc.": (hidden, width), "mlp.c_proj.": (width, hidden)}
            for part, shape in shapes.items():
                state |= {f"{name}.{part}weight": draw(*shape), f"{name}.{part}bias": draw(shape[0])}
        return state

    return {
        "logit_scale": draw(),
        "visual.proj": draw(48, 20),
        "visual.class_embedding": draw(48),
        "visual.positional_embedding": draw(10, 48),
        "visual.conv1.weight": draw(48, 3, 4, 4),
        "text_projection": draw(24, 20),
        "positional_embedding": draw(7, 24),
        "token_embedding.weight": draw(50, 24),
        **norm("visual.ln_pre", 48),
        **norm("visual.ln_post", 48),
        **norm("ln_final", 24),
        **blocks("visual.transformer", 2, 48, 120),
        **blocks("transformer", 3, 24, 96),
    }


class Naive:
    """open_clip's forward pass, written from its definition on its own names."""

    def __init__(self, state: dict[str, Tensor], quick_gelu: bool):
        self.state, self.quick_gelu = state, quick_gelu

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def activation(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid() if self.quick_gelu else x * (1 + (x / math.sqrt(2)).erf()) / 2

    def attention(self, x: Tensor, name: str, heads: int, causal: bool) -> Tensor:
        tokens, width = x.shape
        fused = x @ self.state[f"{name}.in_proj_weight"].T + self.state[f"{name}.in_proj_bias"]
        query, key, value = fused.split(width, dim=1)
        mixed = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = query[:, part] @ key[:, part].T / math.sqrt(width // heads)
            if causal:
                scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
            mixed.append(scores.softmax(-1) @ value[:, part])
        return self.linear(torch.cat(mixed, dim=1), f"{name}.out_proj")

    def transformer(self, x: Tensor, prefix: str, layers: int, heads: int, causal: bool, eps: float) -> Tensor:
        for name in (f"{prefix}.resblocks.{index}" for index in range(layers)):
            x = x + self.attention(self.norm(x, f"{name}.ln_1", eps), f"{name}.attn", heads, causal)
            hidden = self.activation(self.linear(self.norm(x, f"{name}.ln_2", eps), f"{name}.mlp.c_fc"))
            x = x + self.linear(hidden, f"{name}.mlp.c_proj")
        return x

    def image(self, image: Tensor) -> Tensor:
        kernel = self.state["visual.conv1.weight"]
        patches = [image[:, i : i + 4, j : j + 4] for i in range(0, 12, 4) for j in range(0, 12, 4)]
        embedded = [(kernel * patch).sum((1, 2, 3)) for patch in patches]
        x = torch.stack([self.state["visual.class_embedding"], *embedded]) + self.state["visual.positional_embedding"]
        x = self.norm(x, "visual.ln_pre", 0.03)
        x = self.transformer(x, "visual.transformer", layers=2, heads=3, causal=False, eps=0.03)
        return self.norm(x[0], "visual.ln_post", 0.03) @ self.state["visual.proj"]

    def text(self, tokens: Tensor) -> Tensor:
        x = self.state["token_embedding.weight"][tokens] + self.state["positional_embedding"]
        x = self.transformer(x, "transformer", layers=3, heads=2, causal=True, eps=1e-5)
        return self.norm(x, "ln_final", 1e-5)[tokens.argmax()] @ self.state["text_projection"]


def embeddings(model: CLIPModel, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model.vision_model(pixel_values=pixels).pooler_output, model.text_model(input_ids=tokens).pooler_output
        return model.visual_projection(output[0]), model.text_projection(output[1])


def stored(folder: Path, config: dict, state: dict[str, Tensor], name: str = "open_clip_model.safetensors") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(state, folder / name)
    return str(folder)


def open_clip_model(source: str, revision: str | None = None) -> CLIPModel:
    return open_clip_checkpoint(source, revision)[0].model


TOKENS = torch.tensor([[48, 3, 49, 0, 0, 0, 0], [48, 9, 31, 7, 12, 2, 49], [48, 30, 30, 5, 49, 0, 0]])


def small_pixels() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


# The network


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_mapped_model_computes_what_open_clip_defines(tmp_path, quick_gelu, prefix):
    state, config = small_state(), changed(SMALL, "model_cfg.quick_gelu", quick_gelu)
    own = {name: (prefix if not name.startswith(("visual.", "logit_")) else "") + name for name in state}
    source = stored(tmp_path / "c", config, {own[name]: value for name, value in state.items()})

    model = open_clip_model(source)
    images, texts = embeddings(model, small_pixels(), TOKENS)

    naive = Naive(state, quick_gelu)
    torch.testing.assert_close(images, torch.stack([naive.image(image) for image in small_pixels()]), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, torch.stack([naive.text(row) for row in TOKENS]), atol=1e-5, rtol=0)
    other = Naive(state, not quick_gelu)
    assert (images[0] - other.image(small_pixels()[0])).abs().max() > 1e-3
    assert (texts[0] - other.text(TOKENS[0])).abs().max() > 1e-3


def test_every_weight_matters_to_the_comparison():
    """Each weight of the small model moves an output, so the twin above would notice any of them in the wrong place."""
    state = small_state()
    pixels = small_pixels()
    reference = torch.stack([Naive(state, True).image(pixels[0]), Naive(state, True).text(TOKENS[1])])
    silent = []
    for name in state.keys() - {"logit_scale"}:
        moved = state | {name: state[name].flip(0) + 0.1 * state[name].roll(1, -1)}
        outputs = torch.stack([Naive(moved, True).image(pixels[0]), Naive(moved, True).text(TOKENS[1])])
        if (outputs - reference).abs().max() < 1e-3:
            silent.append(name)

    assert silent == []


def test_a_real_vit_b16_survives_the_way_through_the_file():
    config = clip_config(BASE)
    original = CLIPModel._from_config(config, attn_implementation="sdpa").eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in original.named_parameters():
            weight.normal_(0, 0.03, generator=rng)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
    tokens = torch.randint(1, 49406, (3, 77), generator=rng)
    tokens[:, 0] = 49406
    for row, length in enumerate((5, 40, 77)):
        tokens[row, length - 1] = 49407
        tokens[row, length:] = 0
    pixels = torch.randn(2, 3, 224, 224, generator=rng)
    before = embeddings(original, pixels, tokens)

    # 600 MB: not left behind as pytest's own folders are.
    with tempfile.TemporaryDirectory() as folder:
        source = stored(Path(folder) / "b16", BASE, open_clip_state(original.state_dict()))
        reloaded = open_clip_model(source)
    after = embeddings(reloaded, pixels, tokens)

    assert original.state_dict().keys() == reloaded.state_dict().keys()
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in original.state_dict().items())
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert torch.pdist(ours).min() > 1e-2


def test_the_model_is_frozen_float32_and_draws_nothing(tmp_path):
    source = stored(tmp_path / "c", SMALL, {name: value.half() for name, value in small_state().items()})
    generator = torch.get_rng_state()

    found, _ = open_clip_checkpoint(source)
    model = found.model

    assert torch.equal(generator, torch.get_rng_state())
    assert found.folders == (tmp_path / "c",)
    assert not model.training
    assert {(weight.dtype, weight.device.type, weight.requires_grad) for weight in model.parameters()} == {
        (torch.float32, "cpu", False)
    }
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert {part.config._attn_implementation for part in (model, model.vision_model, model.text_model)} == {"sdpa"}


def test_the_model_can_be_saved_and_read_by_transformers(tmp_path):
    model = open_clip_model(stored(tmp_path / "c", SMALL, small_state()))
    model.save_pretrained(tmp_path / "saved")

    again = CLIPModel.from_pretrained(tmp_path / "saved")

    for ours, theirs in zip(
        embeddings(again, small_pixels(), TOKENS), embeddings(model, small_pixels(), TOKENS), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# Names and layouts


def test_the_state_comes_back_exactly():
    state = small_state()

    back = open_clip_state(clip_state(state))

    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) and back[name].is_contiguous() for name, value in state.items())


def test_the_mapping_leaves_dtypes_and_its_argument_alone():
    state = {name: value.bfloat16() for name, value in small_state().items()}
    held = {name: value.clone() for name, value in state.items()}

    mapped = clip_state(state)
    mapped["vision_model.encoder.layers.0.self_attn.q_proj.weight"].zero_()

    assert {value.dtype for value in mapped.values()} == {torch.bfloat16}
    assert all(torch.equal(state[name], value) for name, value in held.items())


def test_the_logit_scale_may_have_one_dimension_and_openai_scalars_are_passed_over():
    state = small_state()
    extra = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}

    mapped = clip_state(state | extra | {"logit_scale": state["logit_scale"].reshape(1)})

    assert torch.equal(mapped["logit_scale"], state["logit_scale"])
    assert mapped.keys() == clip_state(state).keys()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s.pop("visual.ln_pre.bias"), ["1 missing", "'visual.ln_pre.bias'"]),
        (lambda s: [s.pop("ln_final.bias"), s.pop("visual.proj")], ["2 missing", "'ln_final.bias'"]),
        (lambda s: s.update({"text.logit_bias": s["logit_scale"]}), ["1 unknown", "'text.logit_bias'"]),
        (lambda s: s.update({"text.ln_final.bias": s["ln_final.bias"]}), ["1 unknown", "ln_final.bias'"]),
        (
            lambda s: s.update({"transformer.resblocks.9.ln_1.bias": s["ln_final.bias"]}),
            ["12 missing", "'transformer.resblocks.3.attn.in_proj_bias'", "1 unknown", "resblocks.9.ln_1.bias'"],
        ),
        (
            lambda s: s.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(71)}),
            ["'transformer.resblocks.0.attn.in_proj_bias'", "(71,)"],
        ),
        (lambda s: s.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(())}), ["in_proj_bias'", "()"]),
    ],
)
def test_a_state_that_is_not_a_plain_clips_is_refused(change, parts):
    state = small_state()
    change(state)

    with pytest.raises(TowersError) as caught:
        clip_state(state)

    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_transformers_own_names_are_recognised():
    with pytest.raises(TowersError, match="transformers' names already"):
        clip_state(clip_state(small_state()))


def test_the_way_back_refuses_what_is_not_a_clip_model():
    state = clip_state(small_state())
    state["classifier.weight"] = state.pop("visual_projection.weight")

    with pytest.raises(TowersError, match=r"1 missing \(first: 'visual_proj.*1 unknown \(first: 'classifier.weight'\)"):
        open_clip_state(state)


# The config


def test_the_config_of_vit_b16():
    config = clip_config(BASE)

    expected = CLIPConfig(
        projection_dim=512,
        vision_config={"patch_size": 16, "hidden_act": "quick_gelu", "projection_dim": 512},
        text_config={"hidden_act": "quick_gelu", "pad_token_id": 0, "projection_dim": 512},
    )
    assert config.to_dict() == expected.to_dict()
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (49406, 49407)


def test_the_config_carries_every_size():
    config = clip_config(SMALL)

    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_attention_heads) == (48, 120, 3)
    assert (vision.layer_norm_eps, vision.hidden_act, text.hidden_act) == (0.03, "gelu", "gelu")
    assert (text.hidden_size, text.intermediate_size, text.num_attention_heads) == (24, 96, 2)
    assert (text.max_position_embeddings, text.layer_norm_eps) == (7, 1e-5)
    assert (text.bos_token_id, text.eos_token_id, text.vocab_size) == (48, 49, 50)


def test_the_large_models_ratios_give_whole_widths():
    big = changed(BASE, "model_cfg.vision_cfg.width", 1664)
    big = changed(changed(big, "model_cfg.vision_cfg.head_width", 104), "model_cfg.vision_cfg.mlp_ratio", 4.9231)

    vision = clip_config(big).vision_config

    assert (vision.intermediate_size, vision.num_attention_heads) == (8192, 16)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_cfg.timm_model_name", None),
        ("vision_cfg.patch_dropout", 0.5),
        ("vision_cfg.image_size", [224, 224]),
        ("vision_cfg.pool_type", "tok"),
        ("vision_cfg.attentional_pool", False),
        ("vision_cfg.norm_kwargs", {"eps": 1e-5}),
        ("vision_cfg.pos_embed_type", "sin_cos_2d"),
        ("text_cfg.pool_type", "argmax"),
        ("text_cfg.tokenizer_kwargs", {}),
        ("text_cfg.hf_tokenizer_name", "openai/clip-vit-base-patch16"),
        ("custom_text", True),
        ("init_logit_bias", None),
    ],
)
def test_an_option_at_its_neutral_value_changes_nothing(path, value):
    config = clip_config(changed(BASE, f"model_cfg.{path}", value))

    assert config.to_dict() == clip_config(BASE).to_dict()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_cfg.timm_model_name", "vit_base_patch16_siglip_224"),
        ("vision_cfg.layers", [3, 4, 6, 3]),
        ("vision_cfg.image_size", [224, 336]),
        ("vision_cfg.patch_size", [16, 14]),
        ("vision_cfg.attentional_pool", True),
        ("vision_cfg.attentional_pool", "parallel"),
        ("vision_cfg.no_ln_pre", True),
        ("vision_cfg.pool_type", "avg"),
        ("vision_cfg.ls_init_value", 1e-5),
        ("vision_cfg.qk_norm", True),
        ("vision_cfg.norm_kwargs", {"elementwise_affine": False}),
        ("vision_cfg.act_kwargs", {"approximate": "tanh"}),
        ("vision_cfg.rope", True),
        ("text_cfg.hf_model_name", "roberta-base"),
        ("text_cfg.pool_type", "last"),
        ("text_cfg.embed_cls", True),
        ("text_cfg.no_causal_mask", True),
        ("text_cfg.proj_bias", True),
        ("text_cfg.tokenizer_kwargs", {"clean": "lower"}),
        ("model_cfg.init_logit_bias", -10),
        ("model_cfg.multimodal_cfg", {"layers": 12}),
    ],
)
def test_what_clip_model_cannot_express_is_refused(path, value):
    config = changed(BASE, path if path.startswith("model_cfg.") else f"model_cfg.{path}", value)

    with pytest.raises(TowersError) as caught:
        clip_config(config)

    message = str(caught.value)
    assert "\n" not in message
    assert f"open_clip's {path} = {value!r} has no counterpart in CLIPModel: choose a checkpoint" in message


def test_a_timm_tower_is_named_before_the_sizes_it_lacks():
    config = changed(BASE, "model_cfg.vision_cfg", {"timm_model_name": "convnext_base", "image_size": 224})

    with pytest.raises(TowersError, match=r"vision_cfg\.timm_model_name = 'convnext_base'"):
        clip_config(config)


@pytest.mark.parametrize(
    ("path", "value", "must"),
    [
        ("embed_dim", "512", "a positive integer"),
        ("vision_cfg.width", 0, "a positive integer"),
        ("vision_cfg.layers", True, "a positive integer"),
        ("vision_cfg.image_size", [224, 224, 224], "a positive integer"),
        ("vision_cfg.mlp_ratio", "4", "a positive number"),
        ("vision_cfg.norm_kwargs", {"eps": float("nan")}, "a positive number"),
        ("vision_cfg.head_width", 100, "must divide it"),
        ("vision_cfg.head_width", 1000, "must divide it"),
        ("text_cfg.heads", 7, "must divide it"),
        ("text_cfg.vocab_size", 49409, "end-of-text"),
    ],
)
def test_a_malformed_entry_is_refused(path, value, must):
    with pytest.raises(TowersError, match=must) as caught:
        clip_config(changed(BASE, f"model_cfg.{path}", value))

    assert path.split(".")[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_tokenizers_vocabulary_is_refused():
    config = changed(BASE, "model_cfg.text_cfg.hf_tokenizer_name", "bert-base-uncased")

    with pytest.raises(TowersError, match="end-of-text"):
        clip_config(changed(config, "model_cfg.text_cfg.vocab_size", 32000))


@pytest.mark.parametrize(
    "path",
    ["model_cfg", "model_cfg.vision_cfg", "model_cfg.text_cfg", "model_cfg.embed_dim", "model_cfg.text_cfg.heads"],
)
def test_a_missing_key_is_named(path):
    with pytest.raises(TowersError, match=path.split(".")[-1]):
        clip_config(without(BASE, path))


# The files


def test_preprocessing_is_complete(tmp_path):
    stored(tmp_path / "defaults", SMALL, small_state())
    stored(tmp_path / "own", SMALL | {"preprocess_cfg": BASE["preprocess_cfg"]}, small_state())

    _, defaults = open_clip_checkpoint(str(tmp_path / "defaults"))
    _, own = open_clip_checkpoint(str(tmp_path / "own"))

    assert defaults == Preprocessing(size=12)
    assert own == Preprocessing(size=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resample="bilinear")


@pytest.mark.parametrize("name", ["open_clip_model", "open_clip_pytorch_model", "anything"])
def test_the_weights_are_found(tmp_path, name):
    source = stored(tmp_path / "c", SMALL, small_state(), f"{name}.safetensors")
    if name != "anything":
        save_file(clip_state(small_state(seed=1)), tmp_path / "c" / "model.safetensors")

    model = open_clip_model(source)

    assert torch.equal(model.visual_projection.weight, small_state()["visual.proj"].T)


def test_later_changes_of_the_file_do_not_reach_the_model(tmp_path):
    source = stored(tmp_path / "c", SMALL, small_state())
    model = open_clip_model(source)
    path = tmp_path / "c" / "open_clip_model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))

    assert torch.equal(model.text_model.embeddings.token_embedding.weight, small_state()["token_embedding.weight"])


def folder_without_weights(folder: Path, *names: str) -> None:
    stored(folder, SMALL, small_state())
    (folder / "open_clip_model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"weights")


def test_pickled_weights_are_never_read(tmp_path):
    folder_without_weights(tmp_path / "c", "open_clip_pytorch_model.bin")

    with pytest.raises(TowersError, match=r"open_clip_pytorch_model\.bin: pickled weights are not read; convert"):
        open_clip_model(str(tmp_path / "c"))


def test_a_folder_without_weights_is_refused(tmp_path):
    folder_without_weights(tmp_path / "c")

    with pytest.raises(TowersError, match="holds no safetensors weights: pickled"):
        open_clip_model(str(tmp_path / "c"))


def test_two_candidates_are_refused(tmp_path):
    folder_without_weights(tmp_path / "c", "a.safetensors", "b.safetensors")

    with pytest.raises(TowersError, match=r"2 safetensors files \(a\.safetensors, \.\.\.\): name the one"):
        open_clip_model(str(tmp_path / "c"))


def test_a_damaged_file_is_refused(tmp_path):
    folder_without_weights(tmp_path / "c", "open_clip_model.safetensors")

    with pytest.raises(TowersError, match=r"open_clip_model\.safetensors': not a safetensors file, .*; fetch"):
        open_clip_model(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("text", "message"), [(None, "holds no open_clip_config.json"), ("{", "is not JSON"), ("[1]", "is not a table")]
)
def test_a_config_file_that_says_nothing_is_refused(tmp_path, text, message):
    source = stored(tmp_path / "c", SMALL, small_state())
    path = tmp_path / "c" / "open_clip_config.json"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")

    with pytest.raises(TowersError, match=message):
        open_clip_model(source)


def test_a_malformed_preprocessing_is_refused(tmp_path):
    source = stored(tmp_path / "c", SMALL | {"preprocess_cfg": [1]}, small_state())

    with pytest.raises(TowersError, match="preprocess_cfg"):
        open_clip_model(source)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_cfg.embed_dim", 21, r"2 weights: 'text_projection\.weight' is \(20, 24\), by .* \(21, 24\)"),
        (
            "model_cfg.text_cfg.layers",
            4,
            r"missing: 16 weights, first 'text_model\.encoder\.layers\.3.*of another model",
        ),
        ("model_cfg.text_cfg.layers", 2, r"16 weights: 'text_model\.encoder\.layers\.2.*by .* absent"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(tmp_path, path, value, named):
    source = stored(tmp_path / "c", changed(SMALL, path, value), small_state())

    with pytest.raises(TowersError, match=named):
        open_clip_model(source)


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(TowersError, match="a folder has none"):
        open_clip_model(str(tmp_path), revision="main")


# The hub


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "other.safetensors"])
def test_a_hub_id_is_fetched_without_pickles_or_needless_weights(tmp_path, hub, name):
    source = stored(tmp_path / "stored", SMALL, small_state(), name)
    for other in ("pytorch_model.bin", "README.md", "merges.txt", "tokenizer.json"):
        (tmp_path / "stored" / other).write_text("{}")
    if name.startswith("open"):
        (tmp_path / "stored" / "model.safetensors").write_bytes(b"the same for transformers")
    hub.holds("someone/vit", Path(source), revision="abc")

    found, _ = open_clip_checkpoint("someone/vit", revision="abc")

    assert sorted(path.name for path in found.folders[0].iterdir()) == sorted(
        [name, "open_clip_config.json", "merges.txt", "tokenizer.json"]
    )
    assert found.commit == found.folders[0].name
    assert hub.asked == ["someone/vit"]
    open_clip_checkpoint("someone/vit", revision="abc")
    assert hub.asked == ["someone/vit"]  # cached


@pytest.mark.parametrize("error", [FileNotFoundError("not there\nat all"), ValueError("bad id"), ConnectionError()])
def test_a_source_that_cannot_be_fetched_is_refused(monkeypatch, error):
    def model_info(self, repo_id: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    with pytest.raises(
        TowersError, match=r"^'someone/vit' is no folder, not in the cache, and cannot be fetched from the hub: \w.*;"
    ) as caught:
        open_clip_model("someone/vit")

    assert "\n" not in str(caught.value)
