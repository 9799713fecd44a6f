"""A pass in two, through the trunk and on from there, beside the whole pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cairn.errors import ConfigError
from cairn.towers.clip import ClipTowers
from cairn.towers.features import FeatureTowers
from cairn.towers.protocol import TrunkOutput
from cairn.towers.trunk import frozen_parts
from cairn.towers.tuning import Adapter, Bottleneck, Frozen, Full, ImageEncoder, Lora, Projection

BLOCKS = 6
"""Of the embedded tower, which has three other parts: patches, the last norm, the projection."""

PARTS = [
    (Lora(), 1),
    (Lora(targets=r".*q_proj", layers=2), BLOCKS - 1),
    (Lora(targets=r".*fc2", layers=1), BLOCKS),
    (Lora(targets=r".*visual_projection"), BLOCKS + 2),
    (Lora(targets=r".*(layers\.3\.self_attn\.q_proj|layers\.5\.mlp\.fc1)"), 4),
    (Projection(), BLOCKS + 2),
    (Full(), 0),
    (Bottleneck(width=8), 1),
]
ids = [f"{tuning.kind}-{parts}" for tuning, parts in PARTS]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    return torch.randn(5, 3, 56, 56, generator=rng())


def trained(encoder, seed=0):
    """As if a task had been learned."""
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng(100 * seed + i))
    return encoder


def in_precision(towers, precision):
    model, tokenizer, preprocessing = towers._model, towers.tokenizer, towers.preprocessing
    own = ClipTowers(model, tokenizer, preprocessing, name="tiny", device="cpu")
    own.precision = precision  # not what is faster here, but what was asked for
    own._vision.precision = getattr(torch, precision)
    return own


@pytest.mark.parametrize(("tuning", "parts"), PARTS, ids=ids)
def test_the_trunk_ends_below_the_first_part_that_is_trained(towers, tuning, parts):
    module = ImageEncoder(towers, tuning, rng()).module
    assert frozen_parts(module.vision_model, module.visual_projection) == parts


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tuning", "parts"), PARTS, ids=ids)
def test_a_pass_that_goes_on_from_the_trunk_is_the_whole_pass_to_the_bit(towers, pixels, tuning, parts, precision):
    own = in_precision(towers, precision)
    encoder = ImageEncoder(own, tuning, rng())
    assert encoder.has_trunk == (parts >= 2)
    if not encoder.has_trunk:
        return
    with torch.no_grad():
        begun = encoder.trunk(pixels)
        assert (begun.parts, len(begun)) == (parts, 5)
        for task in range(2):  # what it gave before the tower moved serves after it, too
            whole = trained(encoder, task)(pixels)
            assert torch.equal(encoder(begun), whole)
            assert type(encoder(begun)) is torch.Tensor
            with encoder.inference():
                assert torch.equal(encoder(begun), encoder(pixels))


@pytest.mark.parametrize("tuning", [Lora(layers=2), Projection(), Adapter()], ids=lambda tuning: tuning.kind)
def test_frozen_blocks_see_an_image_once(towers, pixels, tuning):
    encoder = ImageEncoder(towers, tuning, rng())
    seen = [0] * BLOCKS
    tower = towers._vision if tuning.kind == "adapter" else encoder.module

    def counting(number):
        return lambda *_: seen.__setitem__(number, seen[number] + 1)

    hooks = [block.register_forward_hook(counting(i)) for i, block in enumerate(tower.vision_model.encoder.layers)]
    before = dict(towers.passes)
    with torch.no_grad():
        begun = encoder.trunk(pixels)
        for task in range(3):
            trained(encoder, task)(begun)
    for hook in hooks:
        hook.remove()
    moving = 2 if tuning.kind == "lora" else 0
    assert seen == [1] * (BLOCKS - moving) + [3] * moving
    counted = {what: towers.passes[what] - before[what] for what in before}
    assert counted["images"] == 5
    assert counted["continued"] == (0 if tuning.kind == "adapter" else 15)  # behind the tower no pass goes on


def test_where_nothing_is_trained_or_there_is_no_tower_there_is_no_trunk(towers):
    assert not ImageEncoder(towers, Frozen(), rng()).has_trunk
    flat = FeatureTowers(name="made", dim=16, logit_scale=20.0, fingerprint="made", names=(), text=None)
    assert not ImageEncoder(flat, Adapter(), rng()).has_trunk


def test_rows_from_above_a_trained_part_are_refused(towers, pixels):
    begun = ImageEncoder(towers, Lora(layers=1), rng()).trunk(pixels)
    with pytest.raises(ValueError, match="rows behind part 5 of a tower, of which an earlier one is trained"):
        ImageEncoder(towers, Lora(layers=3), rng())(begun)


def test_what_is_made_of_a_trunks_rows_is_a_plain_tensor():
    begun = TrunkOutput.of(torch.ones(2, 3), 4)
    assert type(begun + 1) is torch.Tensor
    assert type(begun.rows) is torch.Tensor


def test_layers_are_counted_from_the_last_block(towers):
    def blocks(tuning):
        names = [name for name, p in ImageEncoder(towers, tuning, rng()).module.named_parameters() if p.requires_grad]
        return sorted({int(name.split("layers.")[1].split(".")[0]) for name in names})

    assert blocks(Lora()) == [*range(BLOCKS)]
    assert blocks(Lora(layers=2)) == [4, 5]
    assert blocks(Lora(layers=100)) == [*range(BLOCKS)]
    with pytest.raises(ConfigError, match=r"no layer of the last 2 blocks matches"):
        blocks(Lora(targets=r".*layers\.0\..*k_proj", layers=2))


def test_deltas_of_all_blocks_are_drawn_as_before(towers):
    """The last blocks alone draw from the generator what they would as the only ones that match."""
    some = ImageEncoder(towers, Lora(layers=1), rng()).state_dict()
    same = ImageEncoder(towers, Lora(targets=r".*layers\.5\.self_attn\.(k_proj|v_proj)"), rng()).state_dict()
    assert some.keys() == same.keys()
    assert all(torch.equal(some[name], same[name]) for name in some)
    assert isinstance(towers.vision(), nn.Module)
