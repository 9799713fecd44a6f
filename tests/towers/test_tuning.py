"""What is trained of the image side, and LoRA in particular."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cairn.errors import ConfigError
from cairn.towers.catalogue import load_towers
from cairn.towers.features import FeatureTowers
from cairn.towers.tuning import LORA, Adapter, Bottleneck, Frozen, Full, ImageEncoder, Lora, Projection

CHOICES = [Frozen(), Lora(rank=4), Full(), Projection(), Adapter(), Bottleneck(width=8)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 56, 56, generator=rng())


def shaken(encoder):
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=rng(i))
    return encoder


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.kind)
def test_every_tuning_starts_at_the_pretrained_tower(towers, pixels, choice):
    encoder = ImageEncoder(towers, choice, rng())
    torch.testing.assert_close(encoder(pixels), towers.image(pixels), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("choice", CHOICES[1:], ids=lambda c: c.kind)
def test_gradients_reach_what_is_trained_and_only_that(towers, pixels, choice):
    encoder = ImageEncoder(towers, choice, rng())
    shaken(encoder)
    normalize(encoder(pixels), dim=-1)[:, 0].sum().backward()
    assert encoder.parameters()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())
    assert all(p.grad is None for p in towers._model.parameters())
    frozen = [p for p in encoder.module.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_a_bottleneck_stands_beside_the_mlp_of_every_block(towers, pixels):
    """MLP(x) + scale up(relu(down(x))), written out at one block."""
    encoder = shaken(ImageEncoder(towers, Bottleneck(width=8, scale=0.3), rng()))
    blocks = [m for m in encoder.module.modules() if hasattr(m, "mlp") and hasattr(m.mlp, "down")]
    plain = [m for m in towers.vision().modules() if hasattr(m, "mlp")]
    assert len(blocks) == len(plain) > 1
    x = torch.randn(2, 5, blocks[1].mlp.down.in_features, generator=rng())
    W, a = blocks[1].mlp.down.weight, blocks[1].mlp.down.bias
    V, b = blocks[1].mlp.up.weight, blocks[1].mlp.up.bias
    naive = plain[1].mlp(x) + 0.3 * ((x @ W.T + a).clamp(min=0) @ V.T + b)
    torch.testing.assert_close(blocks[1].mlp(x), naive)
    assert sum(p.numel() for p in encoder.parameters()) == len(blocks) * (W.numel() + a.numel() + V.numel() + b.numel())


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.kind)
def test_state_holds_what_moved_and_nothing_else(towers, pixels, choice):
    encoder = shaken(ImageEncoder(towers, choice, rng()))
    encoder.version = 3
    fresh = ImageEncoder(towers, choice, rng(9))
    fresh.load_state_dict(encoder.state_dict())
    assert fresh.version == 3
    assert torch.equal(fresh(pixels), encoder(pixels))
    assert len(encoder.state_dict()) == 1 + len(encoder.parameters())


def test_lora_touches_the_chosen_layers_of_the_vision_tower_alone(towers):
    encoder = ImageEncoder(towers, Lora(rank=4), rng())
    names = [name for name, p in encoder.module.named_parameters() if p.requires_grad]
    layers = towers._model.config.vision_config.num_hidden_layers
    assert len(names) == 2 * 2 * layers
    assert all("lora_" in name and ("k_proj" in name or "v_proj" in name) for name in names)
    everything = ImageEncoder(towers, Lora(rank=4, targets=r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"), rng())
    assert len(everything.parameters()) == 2 * 6 * layers


def test_lora_is_the_written_formula(towers):
    choice = Lora(rank=4, alpha=6.0)
    encoder = shaken(ImageEncoder(towers, choice, rng()))
    layer = encoder.module.vision_model.encoder.layers[0].self_attn.k_proj
    x = torch.randn(5, layer.base_layer.in_features, generator=rng(3))
    A, B = layer.lora_A[LORA].weight, layer.lora_B[LORA].weight
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + choice.alpha / choice.rank * (x @ A.T) @ B.T
    torch.testing.assert_close(layer(x), expected)


def test_dropout_is_the_written_formula_and_off_outside_training(towers):
    """(alpha / rank) B A (x m / (1 - p)), m the numbers above p of the generator's uniform ones."""
    p, choice = 0.4, Lora(rank=4, alpha=6.0, dropout=0.4)
    encoder = shaken(ImageEncoder(towers, choice, rng()))
    layer = encoder.module.vision_model.encoder.layers[0].self_attn.k_proj
    x = torch.randn(5, layer.base_layer.in_features, generator=rng(3))
    A, B = layer.lora_A[LORA].weight, layer.lora_B[LORA].weight
    base = x @ layer.base_layer.weight.T + layer.base_layer.bias

    def expected(seen):
        return base + choice.alpha / choice.rank * (seen @ A.T) @ B.T

    m = torch.rand(x.shape, generator=rng(8)) >= p
    with encoder.training(rng(8)):
        torch.testing.assert_close(layer(x), expected(x * m / (1 - p)))
    torch.testing.assert_close(layer(x), expected(x))
    with encoder.inference():
        torch.testing.assert_close(layer(x), expected(x))


def test_dropout_draws_from_its_generator_alone(towers, pixels):
    encoder = shaken(ImageEncoder(towers, Lora(rank=4, dropout=0.5), rng()))
    state, seen = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        with encoder.training(rng(seed)):
            seen.append(encoder(pixels).detach())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)
    assert torch.equal(encoder(pixels), encoder(pixels))
    torch.testing.assert_close(sum(seen).norm(), 3 * encoder(pixels).norm(), rtol=0.2, atol=0)
    with pytest.raises(ZeroDivisionError), encoder.training(rng()):
        _ = 1 / 0
    assert torch.equal(encoder(pixels), encoder(pixels))


def test_merged_gives_the_same_embeddings_and_leaves_the_weights_to_the_bit(towers, pixels):
    encoder = shaken(ImageEncoder(towers, Lora(rank=4), rng()))
    apart = encoder(pixels).detach()
    before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
    with encoder.inference():
        merged = encoder(pixels)
        weight = encoder.module.vision_model.encoder.layers[0].self_attn.k_proj.base_layer.weight
        assert not torch.equal(weight, before["vision_model.encoder.layers.0.self_attn.k_proj.base_layer.weight"])
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)
    after = encoder.module.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(encoder(pixels).detach(), apart)


def test_weights_come_back_even_if_inference_fails(towers, pixels):
    encoder = shaken(ImageEncoder(towers, Lora(rank=4), rng()))
    apart = encoder(pixels).detach()
    with pytest.raises(ZeroDivisionError), encoder.inference():
        _ = 1 / 0
    assert torch.equal(encoder(pixels).detach(), apart)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 6.0), (3, 1.0)])
def test_lora_is_that_of_peft_to_the_bit(towers, pixels, rank, alpha):
    from peft import LoraConfig, inject_adapter_in_model

    choice = Lora(rank=rank, alpha=alpha)
    encoder = shaken(ImageEncoder(towers, choice, rng()))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=choice.targets, bias="none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = inject_adapter_in_model(config, towers.vision(), adapter_name=LORA).eval()
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in encoder.module.named_parameters()]
    theirs.load_state_dict(encoder.module.state_dict())

    assert torch.equal(theirs(pixels), encoder(pixels))
    for module in (theirs, encoder.module):
        module(pixels).square().sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    assert all(torch.equal(p.grad, wanted[name]) for name, p in encoder.module.named_parameters() if p.requires_grad)
    for layer in theirs.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    with encoder.inference():
        assert torch.equal(theirs(pixels), encoder(pixels))


def test_lora_draws_from_its_generator_alone(towers):
    state = torch.get_rng_state()
    first, second = (ImageEncoder(towers, Lora(rank=4), rng(5)).state_dict() for _ in range(2))
    other = ImageEncoder(towers, Lora(rank=4), rng(6)).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_targets_that_match_nothing_are_named(towers):
    with pytest.raises(
        ConfigError, match=r"lora targets 'no_such_layer': no layer matches; linear layers are named like"
    ):
        ImageEncoder(towers, Lora(targets="no_such_layer"), rng())


@pytest.mark.parametrize("choice", [Lora(), Full(), Projection()], ids=lambda c: c.kind)
def test_a_features_file_has_no_tower_to_tune(choice):
    flat = FeatureTowers(name="f", dim=4, logit_scale=1.0, fingerprint="f", names=(), text=None)
    with pytest.raises(ConfigError, match="take adapter or none"):
        ImageEncoder(flat, choice, rng())


class Casts(TorchDispatchMode):
    """How many numbers are brought to bfloat16."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reduced(towers, monkeypatch):
    """The towers in bfloat16, however slow that is here."""
    monkeypatch.setattr("cairn.towers.precision.bfloat16_slowdown", lambda device: 0.5)
    return load_towers("tiny", device="cpu", precision="bfloat16")


@pytest.mark.parametrize("choice", [CHOICES[1], *CHOICES[3:4], CHOICES[5]], ids=lambda c: c.kind)
def test_frozen_weights_in_bfloat16_give_the_same_bits_with_fewer_casts(reduced, pixels, monkeypatch, choice):
    ours = shaken(ImageEncoder(reduced, choice, rng()))
    monkeypatch.setattr("cairn.towers.tuning._keep_as_computed", lambda *_: None)
    plain = shaken(ImageEncoder(reduced, choice, rng()))
    found = []
    for encoder in (ours, plain):
        with Casts() as casts:
            value = encoder(pixels)
            value.square().sum().backward()
        found.append((value, [parameter.grad for parameter in encoder.parameters()], casts.numbers))
        with encoder.inference():
            found[-1] = (*found[-1], encoder(pixels))
    (value, gradients, casts, merged), (expected, its, more, its_merged) = found
    assert torch.equal(value, expected)
    assert torch.equal(merged, its_merged)
    assert all(torch.equal(a, b) for a, b in zip(gradients, its, strict=True))
    halved = [p for p in ours.module.parameters() if p.dtype == torch.bfloat16]
    assert more - casts == sum(p.numel() for p in halved) > 0
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_what_a_full_tuning_trains_and_the_towers_themselves_stay_in_float32(reduced):
    for module in (ImageEncoder(reduced, Full(), rng()).module, reduced._model):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_state_learned_in_bfloat16_is_that_of_float32(reduced, towers, pixels):
    learned = shaken(ImageEncoder(reduced, Lora(rank=4), rng()))
    again = ImageEncoder(towers, Lora(rank=4), rng(1))
    again.load_state_dict(learned.state_dict())
    assert (normalize(again(pixels), dim=-1) * normalize(learned(pixels), dim=-1)).sum(-1).min() > 0.999
