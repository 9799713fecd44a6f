"""open_clip checkpoints on transformers' `CLIPModel`: names and layouts, nothing trained and nothing approximated.

Both hold the same network. open_clip keeps query, key and value of a block in one matrix, stacked by rows, and stores
the two projections as (width, embedding), for `x @ proj`; transformers has three matrices and (embedding, width).

Source: OpenCLIP (Ilharco et al., 2021), layout of its `CLIP` and `CustomTextCLIP` models.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import CLIPConfig

from cairn.errors import TowersError, first_line
from cairn.towers.adapter import has_adapter
from cairn.towers.hub import find_checkpoint
from cairn.towers.preprocessing import Preprocessing, open_clip_preprocessing
from cairn.towers.weights import (
    ClipCheckpoint,
    image_side,
    model_with,
    no_weights,
    prefix_notices,
    read_file,
    without_prefixes,
)

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
CLIP_VOCABULARY = 49408

# open_clip's options that change the network, with the values at which it is CLIPModel's.
_OFF, _NOTHING = (None, False), (None, {})
_BLOCK = {
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    "qk_norm": _OFF,
    "scaled_cosine_attn": _OFF,
    "scale_heads": _OFF,
    "scale_attn_inner": _OFF,
    "scale_attn": _OFF,
    "scale_fc": _OFF,
    "act_kwargs": _NOTHING,
}
_VISION = {
    "timm_model_name": (None, ""),
    "attentional_pool": _OFF,
    "no_ln_pre": _OFF,
    "pool_type": (None, "tok"),
    "pos_embed_type": ("learnable", "sin_cos_2d"),  # either way the checkpoint holds the table
    "in_chans": (3,),
    **_BLOCK,
}
_TEXT = {
    "hf_model_name": (None, ""),
    "embed_cls": _OFF,
    "no_causal_mask": _OFF,
    "pool_type": (None, "argmax"),
    "proj_type": ("linear",),
    "proj_bias": _OFF,
    "tokenizer_kwargs": _NOTHING,
    **_BLOCK,
}
_MODEL = {"multimodal_cfg": (None,), "init_logit_bias": (None,)}

# Options that are read, or that change no embedding: of training, of towers already refused, or (the order of final
# norm and pooling) indifferent where one token is pooled.
_SHARED_FREE = {"layers", "width", "mlp_ratio", "norm_kwargs", "final_ln_after_pool", "output_tokens"}
_VISION_FREE = _SHARED_FREE | {
    *("head_width", "patch_size", "image_size", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
}
_TEXT_FREE = _SHARED_FREE | {
    *("context_length", "vocab_size", "heads", "pad_id", "eos_id", "hf_tokenizer_name"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
_MODEL_FREE = {
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"),
    *("custom_text", "init_logit_scale", "nonscalar_logit_scale", "output_dict", "cast_dtype"),
}
_REMEDY = {
    "model_cfg": "choose a checkpoint of open_clip's plain CLIP, such as ViT-B-16",
    "vision_cfg": "choose a checkpoint whose image tower is open_clip's own ViT, such as ViT-B-16",
    "text_cfg": "choose a checkpoint with open_clip's own CLIP text transformer, such as ViT-B-16",
}


def clip_config(open_clip_config: Mapping[str, Any]) -> CLIPConfig:
    """The `CLIPConfig` of the network that an `open_clip_config.json` describes.

    The text tower's start and end tokens are the last two of the vocabulary, as in CLIP's own (49406, 49407): open_clip
    pools at the largest id of a row, and pads with 0.

    Raises TowersError for a key that is missing or malformed and for an option that `CLIPModel` cannot express.
    Source layout: `model_cfg` of `open_clip_config.json`.
    """
    model = _section(open_clip_config, "model_cfg", CONFIG)
    vision, text = _section(model, "vision_cfg", "model_cfg"), _section(model, "text_cfg", "model_cfg")
    _refuse("vision_cfg", vision, _VISION, _VISION_FREE)
    _refuse("text_cfg", text, _TEXT, _TEXT_FREE)
    _refuse("model_cfg", model, _MODEL, _MODEL_FREE)
    if isinstance(vision.get("layers"), list | tuple):
        raise _inexpressible("vision_cfg", "layers", vision["layers"])

    dim = _count(model, "embed_dim", "model_cfg")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    vision_width, text_width = _count(vision, "width", "vision_cfg"), _count(text, "width", "text_cfg")
    vocabulary = _count(text, "vocab_size", "text_cfg")
    if vocabulary > CLIP_VOCABULARY or (text.get("hf_tokenizer_name") and vocabulary != CLIP_VOCABULARY):
        raise TowersError(
            f"open_clip's text_cfg.vocab_size = {vocabulary} is not of CLIP's tokenizer, so the end-of-text token is "
            f"not known: {_REMEDY['text_cfg']}"
        )
    return CLIPConfig(
        projection_dim=dim,
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": _hidden(vision, vision_width, "vision_cfg"),
            "projection_dim": dim,
            "num_hidden_layers": _count(vision, "layers", "vision_cfg"),
            "num_attention_heads": _heads(vision, vision_width),
            "image_size": _side(vision, "image_size"),
            "patch_size": _side(vision, "patch_size"),
            "hidden_act": activation,
            "layer_norm_eps": _epsilon(vision, "vision_cfg"),
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": _hidden(text, text_width, "text_cfg"),
            "projection_dim": dim,
            "num_hidden_layers": _count(text, "layers", "text_cfg"),
            "num_attention_heads": _divisor(text_width, _count(text, "heads", "text_cfg"), "text_cfg.heads"),
            "max_position_embeddings": _count(text, "context_length", "text_cfg"),
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
            "hidden_act": activation,
            "layer_norm_eps": _epsilon(text, "text_cfg"),
        },
    )


def clip_state(open_clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`CLIPModel`'s state of an open_clip state, dtypes kept. Nothing is computed, so the way back is exact.

    The text tower's names may carry the prefix `text.` (`CustomTextCLIP`); the logit scale may have shape () or (1,).

    Raises TowersError for names that are missing or left over, with the first of them and how many.
    Source layout: the `state_dict` of open_clip's `CLIP`.
    """
    names = {name.removeprefix("text."): name for name in open_clip_state if name not in _SCALARS}
    if any(name.startswith("vision_model.") for name in names):
        raise TowersError("these weights have transformers' names already: load them as a transformers checkpoint")
    rows = list(_rows(_depth(names, "visual.transformer.resblocks."), _depth(names, "transformer.resblocks.")))
    # By the full names, so that one weight under both `x` and `text.x` is left over.
    left = [name for name in open_clip_state if name not in _SCALARS and names[name.removeprefix("text.")] != name]
    _complete({source for source, *_ in rows}, names, names, left, "open_clip")
    state: dict[str, Tensor] = {}
    for source, targets, transposed in rows:
        tensor = open_clip_state[names[source]]
        if source == "logit_scale":
            tensor = tensor.squeeze()
        if transposed:
            tensor = tensor.movedim(0, -1).contiguous()
        if len(targets) == 1:
            state[targets[0]] = tensor
        elif tensor.ndim == 0 or len(tensor) % len(targets):
            shape = tuple(tensor.shape)
            raise TowersError(f"'{names[source]}' has shape {shape}, not three equal parts; fetch the checkpoint again")
        else:
            state.update(
                (target, part.clone()) for target, part in zip(targets, tensor.chunk(len(targets)), strict=True)
            )
    return state


def open_clip_state(clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state of a `CLIPModel`'s: the inverse of `clip_state`, in the layout without the prefix `text.`.

    Raises TowersError for names that are missing or left over, with the first of them and how many.
    """
    depths = (_depth(clip_state, f"{side}_model.encoder.layers.") for side in ("vision", "text"))
    rows = list(_rows(*depths))
    _complete({name for _, targets, _ in rows for name in targets}, clip_state, {}, (), "CLIPModel")
    state: dict[str, Tensor] = {}
    for source, targets, transposed in rows:
        parts = [clip_state[name] for name in targets]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        state[source] = tensor.movedim(0, -1).contiguous() if transposed else tensor
    return state


def open_clip_checkpoint(source: str, revision: str | None = None) -> tuple[ClipCheckpoint, Preprocessing]:
    """A frozen float32 `CLIPModel` in evaluation mode with the folder it was read from, and its preprocessing.

    `source` is a folder or the id of a repository on the hub, `revision` a branch, tag or commit of the latter. No random
    number is drawn.

    Raises TowersError for a folder that lacks the config or safetensors weights, weights that do not fit the config,
    and whatever `clip_config` and `clip_state` refuse. Pickled weights are never opened.
    """
    place = find_checkpoint(source, revision, (CONFIG,), _chosen, _is_complete)
    folder = place.folder
    if has_adapter(folder):
        raise TowersError(
            f"'{folder}': an adapter beside open_clip's weights is not merged on loading; merge it and save the model"
        )
    described = _described(folder)
    config = clip_config(described)
    path = _weights(folder)
    state, prefixes = without_prefixes(read_file(path), path)
    model, _ = model_with(config, clip_state(state), path, CONFIG)
    where = f"'{folder / CONFIG}': preprocess_cfg"
    preprocessing = open_clip_preprocessing(described.get("preprocess_cfg") or {}, image_side(model), where)
    return ClipCheckpoint(model, (folder,), place.commit, prefix_notices(prefixes, folder)), preprocessing


# The two layouts, row by row: open_clip's name, transformers' names, and whether open_clip stores the transpose.

_Row = tuple[str, tuple[str, ...], bool]
_SCALARS = ("input_resolution", "context_length", "vocab_size")
"""Integers that OpenAI's own archives keep among the weights."""


def _rows(vision_layers: int, text_layers: int) -> Iterator[_Row]:
    yield "logit_scale", ("logit_scale",), False
    yield "visual.proj", ("visual_projection.weight",), True
    yield "text_projection", ("text_projection.weight",), True
    yield "visual.class_embedding", ("vision_model.embeddings.class_embedding",), False
    yield "visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",), False
    yield "visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",), False
    yield "token_embedding.weight", ("text_model.embeddings.token_embedding.weight",), False
    yield "positional_embedding", ("text_model.embeddings.position_embedding.weight",), False
    for kind in ("weight", "bias"):
        # transformers' own spelling
        yield f"visual.ln_pre.{kind}", (f"vision_model.pre_layrnorm.{kind}",), False
        yield f"visual.ln_post.{kind}", (f"vision_model.post_layernorm.{kind}",), False
        yield f"ln_final.{kind}", (f"text_model.final_layer_norm.{kind}",), False
    for index in range(vision_layers):
        yield from _block(f"visual.transformer.resblocks.{index}", f"vision_model.encoder.layers.{index}")
    for index in range(text_layers):
        yield from _block(f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}")


def _block(source: str, target: str) -> Iterator[_Row]:
    for kind in ("weight", "bias"):
        attention = f"{target}.self_attn"
        yield f"{source}.attn.in_proj_{kind}", tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv"), False
        yield f"{source}.attn.out_proj.{kind}", (f"{attention}.out_proj.{kind}",), False
        yield f"{source}.ln_1.{kind}", (f"{target}.layer_norm1.{kind}",), False
        yield f"{source}.ln_2.{kind}", (f"{target}.layer_norm2.{kind}",), False
        yield f"{source}.mlp.c_fc.{kind}", (f"{target}.mlp.fc1.{kind}",), False
        yield f"{source}.mlp.c_proj.{kind}", (f"{target}.mlp.fc2.{kind}",), False


def _depth(names: Collection[str], prefix: str) -> int:
    """How many different blocks there are: a gap in their numbers then shows as a name missing and one left over."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})


def _complete(
    expected: set[str], names: Collection[str], full: Mapping[str, str], twice: Collection[str], layout: str
) -> None:
    """Raises TowersError unless `names` are the expected ones; `full` says how the checkpoint spells them."""
    missing = sorted(expected.difference(names))
    unknown = sorted([full.get(name, name) for name in names if name not in expected] + list(twice))
    found = [f"{len(missing)} missing (first: '{missing[0]}')"] if missing else []
    found += [f"{len(unknown)} unknown (first: '{unknown[0]}')"] if unknown else []
    if found:
        raise TowersError(f"not the weights of {layout}'s plain CLIP: {', '.join(found)}; {_REMEDY['model_cfg']}")


# The config's entries.


def _section(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise TowersError(f"open_clip's {where} has no '{key}': it must be an {CONFIG} as the hub holds it")
    return found


def _inexpressible(section: str, key: str, value: Any) -> TowersError:
    return TowersError(f"open_clip's {section}.{key} = {value!r} has no counterpart in CLIPModel: {_REMEDY[section]}")


def _refuse(
    section: str, options: Mapping[str, Any], neutral: Mapping[str, Collection[Any]], free: Collection[str]
) -> None:
    for key, accepted in neutral.items():
        if key in options and options[key] not in accepted:
            raise _inexpressible(section, key, options[key])
    for key in options:
        if key not in neutral and key not in free:
            raise _inexpressible(section, key, options[key])


def _invalid(where: str, value: Any, must: str) -> TowersError:
    return TowersError(f"open_clip's {where} = {value!r}: must be {must}; correct {CONFIG}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(options: Mapping[str, Any], key: str, section: str) -> int:
    value = options.get(key)
    if not _is_count(value):
        raise _invalid(f"{section}.{key}", value, "a positive integer")
    return value


def _side(vision: Mapping[str, Any], key: str) -> int:
    value = vision.get(key)
    if isinstance(value, list | tuple) and len(value) == 2:
        if value[0] != value[1]:
            raise _inexpressible("vision_cfg", key, value)
        value = value[0]
    if not _is_count(value):
        raise _invalid(f"vision_cfg.{key}", vision.get(key), "a positive integer")
    return value


def _positive(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise _invalid(where, value, "a positive number")
    return float(value)


def _hidden(options: Mapping[str, Any], width: int, section: str) -> int:
    return int(width * _positive(options.get("mlp_ratio", 4.0), f"{section}.mlp_ratio"))


def _heads(vision: Mapping[str, Any], width: int) -> int:
    head_width = _count({"head_width": 64, **vision}, "head_width", "vision_cfg")
    return _divisor(width, width // head_width, "vision_cfg.head_width")


def _divisor(width: int, heads: int, where: str) -> int:
    if heads < 1 or width % heads:
        raise TowersError(f"open_clip's {where} makes {heads} heads of width {width}: must divide it; correct {CONFIG}")
    return heads


def _epsilon(options: Mapping[str, Any], section: str) -> float:
    norm = options.get("norm_kwargs") or {}
    if not isinstance(norm, Mapping) or set(norm) - {"eps"}:
        raise _inexpressible(section, "norm_kwargs", norm)
    return _positive(norm.get("eps", 1e-5), f"{section}.norm_kwargs.eps")


# The files.


def _chosen(names: Sequence[str]) -> list[str]:
    """Tokenizer files are JSON, and `merges.txt`. Many repositories hold the same weights for transformers too."""
    weights = [name for name in names if name in WEIGHTS] or [name for name in names if name.endswith(".safetensors")]
    return weights + [name for name in names if name.endswith((".json", ".txt"))]


def _is_complete(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


def _described(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TowersError(f"'{folder}' holds no {CONFIG}: copy it beside the weights") from None
    except (ValueError, RecursionError) as error:
        raise TowersError(f"'{path}' is not JSON: {first_line(error)}; fetch the checkpoint again") from None
    if not isinstance(described, Mapping):
        raise TowersError(f"'{path}' is not a table; fetch the checkpoint again")
    return described


def _named(folder: Path) -> list[Path]:
    return [folder / name for name in WEIGHTS if (folder / name).is_file()]


def _weights(folder: Path) -> Path:
    found = _named(folder)[:1] or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise TowersError(
            f"'{folder}' holds {len(found)} safetensors files ({found[0].name}, ...): name the one to read {WEIGHTS[0]}"
        )
    raise no_weights(folder, WEIGHTS[0])
