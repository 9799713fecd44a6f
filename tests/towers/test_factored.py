"""Layers with a delta between shared bases, and prompt tokens at the input of the image tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cairn.errors import ConfigError
from cairn.towers.factored import Factored, inject, plain
from cairn.towers.tokens import WithTokens, first_patch
from cairn.towers.tuning import LORA, Lora, LowRank

TARGETS = r".*vision_model.*\.self_attn\.(k_proj|v_proj)"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 56, 56, generator=rng())


def linear(i=7, o=5):
    base = nn.Linear(i, o, device="meta").to_empty(device="cpu")
    for n, p in enumerate(base.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=rng(n + 10)))
        p.requires_grad_(False)
    return base


def moved(*layers, rank=2, seed=3):
    """Each with a finished task and an open one, all of its matrices correlated and away from where they start."""
    for n, layer in enumerate(layers):
        for own, count in ((layer, 1), (layer, 2)):
            own.open(rank, rng(seed + n + count))
            own.N.data.copy_(
                0.3 * torch.randn(own.N.shape, generator=rng(seed + n)) @ own.V.new_ones(own.N.shape[1]).diag()
            )
            if count == 1:
                own.close(own.product())
    return layers[0]


def test_the_delta_is_the_written_product():
    base = linear()
    layer = moved(Factored(base, 4, rng()))
    layer.mask = torch.tensor([1.0, 0.4])
    x = torch.randn(6, 7, generator=rng(1))
    C = layer.C + layer.M @ torch.diag(layer.mask) @ layer.N
    wanted = x @ (base.weight + layer.U @ C @ layer.V).T + base.bias
    torch.testing.assert_close(layer(x), wanted)


def test_bases_are_orthonormal_and_no_larger_than_the_layer():
    layer = Factored(linear(), 4, rng())
    torch.testing.assert_close(layer.U.T @ layer.U, torch.eye(4))
    torch.testing.assert_close(layer.V @ layer.V.T, torch.eye(4))
    assert Factored(linear(), 16, rng()).C.shape == (5, 5)


def test_with_the_identity_between_them_it_is_the_delta_of_a_lora(towers, pixels):
    """alpha = r, B = U, A = V, of every layer."""
    ours = towers.vision()
    theirs = Lora(rank=4, alpha=4.0, targets=TARGETS).attach(towers.vision(), towers.dim, rng())
    layers = inject(ours, TARGETS, 4, rng(2))
    adapted = [module for module in theirs.modules() if isinstance(module, LowRank)]
    assert len(adapted) == len(layers)
    with torch.no_grad():
        for lora_layer, layer in zip(adapted, layers, strict=True):
            layer.C.copy_(torch.eye(4))
            lora_layer.lora_A[LORA].weight.copy_(layer.V)
            lora_layer.lora_B[LORA].weight.copy_(layer.U)
        torch.testing.assert_close(ours(pixels), theirs(pixels), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(pixels), towers.image(pixels), atol=1e-2)


def test_it_starts_at_the_pretrained_tower_and_a_new_task_moves_nothing(towers, pixels):
    tower = towers.vision()
    layers = inject(tower, TARGETS, 8, rng())
    torch.testing.assert_close(tower(pixels), towers.image(pixels), atol=1e-6, rtol=1e-6)
    moved(*layers)
    for layer in layers:
        layer.close(layer.product())
    before = tower(pixels).detach()
    assert not torch.allclose(before, towers.image(pixels), atol=1e-3)
    for layer in layers:
        layer.open(8, rng(4))
    torch.testing.assert_close(tower(pixels), before, atol=1e-5, rtol=1e-5)


def test_merged_is_as_unmerged_and_the_weight_comes_back_to_the_bit():
    base = linear()
    before, x = base.weight.data.clone(), torch.randn(6, 7, generator=rng(1))
    layer = moved(Factored(base, 4, rng()))
    layer.close(layer.product())
    merged = layer(x)
    assert not torch.equal(base.weight, before)
    layer.merge()
    assert torch.equal(layer(x), merged)
    layer.unmerge()
    assert torch.equal(base.weight, before)
    torch.testing.assert_close(layer(x), merged, atol=1e-6, rtol=1e-6)


def test_what_is_beyond_the_rank_is_cut():
    layer = moved(Factored(linear(), 4, rng()), rank=3)
    C, M, N = layer.C.clone(), layer.M.detach().clone(), layer.N.detach().clone()
    layer.close(layer.product(2))
    torch.testing.assert_close(layer.C, C + M[:, :2] @ N[:2])
    assert layer.M is None
    assert not layer.product().any()


def test_factors_are_restored_alone_and_of_the_right_size():
    layer = moved(Factored(linear(), 4, rng()))
    layer.close(layer.product())
    x, kept = torch.randn(6, 7, generator=rng(1)), layer.factors()
    fresh = Factored(linear(), 4, rng(8))
    fresh.restore(kept)
    assert torch.equal(fresh(x), layer(x))
    assert {key: tuple(value.shape) for key, value in kept.items()} == {"U": (5, 4), "V": (4, 7), "C": (4, 4)}
    with pytest.raises(ConfigError, match=r"U of a factored layer: \(5, 4\), not \(5, 3\)"):
        Factored(linear(), 3, rng()).restore(kept)


def test_a_plain_copy_computes_the_same_and_holds_no_factors(towers, pixels):
    tower = towers.vision()
    layers = inject(tower, TARGETS, 4, rng())
    moved(*layers)
    for layer in layers:
        layer.close(layer.product())
    twin = plain(tower)
    assert not any(isinstance(m, Factored) for m in twin.modules())
    torch.testing.assert_close(twin(pixels), tower(pixels), atol=1e-6, rtol=1e-6)
    assert all(isinstance(layer, Factored) for layer in layers)


def test_targets_that_match_nothing_are_named(towers):
    with pytest.raises(ConfigError, match="tuning targets 'none': no layer matches; linear layers are named like"):
        inject(towers.vision(), "none", 4, rng())


def with_tokens(towers, number):
    tower = towers.vision()
    entry = WithTokens(tower.vision_model.embeddings)
    tower.vision_model.embeddings = entry
    width = towers._model.config.vision_config.hidden_size
    entry.tokens = nn.Parameter(torch.randn(number, width, generator=rng(6)))
    return tower


def test_without_tokens_the_tower_is_the_same_to_the_bit(towers, pixels):
    assert torch.equal(with_tokens(towers, 0)(pixels), towers.image(pixels))


def test_tokens_stand_between_class_token_and_patches(towers, pixels):
    tower, own = with_tokens(towers, 3), towers.vision()
    entry = tower.vision_model.embeddings
    x, given = own.vision_model.embeddings(pixels), entry(pixels)
    assert torch.equal(given[:, :1], x[:, :1])
    assert torch.equal(given[:, 1:4], entry.tokens.expand(3, -1, -1))
    assert torch.equal(given[:, 4:], x[:, 1:])
    assert not torch.allclose(tower(pixels), own(pixels), atol=1e-3)


@pytest.mark.parametrize("attention", ["native", "value"])
def test_patches_are_those_of_the_image_and_no_tokens(towers, pixels, attention):
    tower = with_tokens(towers, 3)
    image, patches = tower.tokens(pixels, attention)
    _, without = towers.image_and_patches(pixels, attention)
    assert first_patch(tower.vision_model) == 4
    assert patches.shape == without.shape
    torch.testing.assert_close(image, tower(pixels))
    same = torch.nn.functional.cosine_similarity(patches, without, dim=-1).mean()
    shifted = torch.nn.functional.cosine_similarity(patches[:, :-1], without[:, 1:], dim=-1).mean()
    assert same > shifted
