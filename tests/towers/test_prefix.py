"""Soft prompts through a tree of shared segments, against every prompt run whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from cairn.errors import ConfigError
from cairn.towers import prefix
from cairn.towers.clip import ClipTowers
from cairn.towers.preprocessing import Preprocessing
from cairn.towers.prompts import Prompts, SoftPrompts, prompt_embeddings

TASKS = (("ring", "sweet pepper"), ("striped red star",), ("plain_blue_circle", "bear", "red ring", "bed"))
BLOCKS = [(4, 0, 0), (0, 3, 0), (0, 0, 2), (4, 3, 0), (4, 0, 2), (0, 3, 2), (4, 3, 2)]


def small(towers, act: str = "quick_gelu", precision: str = "float32") -> ClipTowers:
    """A text tower of random weights, norms and positions, with the tokenizer of the tiny towers."""
    text = {
        "vocab_size": towers.tokenizer.vocab_size + 8,
        "bos_token_id": towers.bos,
        "eos_token_id": towers.eos,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "hidden_act": act,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPModel(CLIPConfig(projection_dim=16, text_config=text, vision_config=vision | {"image_size": 32}))
    generator = rng()
    with torch.no_grad():
        for name, parameter in (*model.text_model.named_parameters(), *model.text_projection.named_parameters()):
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.3 * torch.randn(parameter.shape, generator=generator))
    return ClipTowers(model, towers.tokenizer, Preprocessing(size=32), name="small", device="cpu", precision=precision)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grown(towers: ClipTowers, blocks: tuple[int, int, int], tasks=TASKS, **choice) -> SoftPrompts:
    """Every block filled with numbers as large as token embeddings and larger."""
    shared, task, per_class = blocks
    texts = Prompts(shared=shared, task=task, per_class=per_class, **choice).build(towers)
    for index, names in enumerate(tasks):
        texts.grow(names, torch.zeros(len(names), towers.dim), rng(index))
        with torch.no_grad():
            for block in texts.trainable():
                block.copy_(0.5 * torch.randn(block.shape, generator=rng(index)))
    return texts


def run_whole(towers: ClipTowers, texts: SoftPrompts) -> torch.Tensor:
    """The naive twin: one context per class, put together one by one."""
    contexts = [
        torch.cat([texts.shared, task, own])
        for task, owns in zip(texts.task, texts.per_class, strict=True)
        for own in owns
    ]
    return normalize(prompt_embeddings(towers, torch.stack(contexts), texts.names), dim=-1)


def with_gradients(value: torch.Tensor, texts: SoftPrompts) -> tuple[torch.Tensor, list[torch.Tensor]]:
    weight = torch.randn(value.shape, generator=rng(9), dtype=value.dtype)
    return value.detach(), list(torch.autograd.grad((weight * value).sum(), texts.trainable()))


def apart(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative difference, block by block."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("tasks", [TASKS, TASKS[2:]], ids=["three tasks", "one task"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_sharing_changes_neither_texts_nor_gradients(towers, blocks, tasks, act):
    double = small(towers, act)
    double._model.double()
    texts = grown(double, blocks, tasks).double()
    got, gradients = with_gradients(texts(), texts)
    expected, theirs = with_gradients(run_whole(double, texts), texts)
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() < 1e-10
    assert apart(gradients, theirs) < 1e-10
    assert min(gradient.flatten(1).norm(dim=1).min() for gradient in gradients) > 1e-4  # every row of every block


@pytest.mark.parametrize("blocks", [(0, 0, 4), (4, 3, 2)], ids=str)
def test_so_it_is_in_single_precision(towers, blocks):
    for single in (small(towers), towers):
        texts = grown(single, blocks)
        got, gradients = with_gradients(texts(), texts)
        expected, theirs = with_gradients(run_whole(single, texts), texts)
        assert (got - expected).abs().max() < 1e-5
        assert apart(gradients, theirs) < 1e-4


@pytest.fixture
def every_weight_in_order(monkeypatch):
    """As large ones are on a processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(prefix, "LARGE", 0)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("blocks", [(0, 0, 4), (4, 3, 2)], ids=str)
def test_so_it_is_with_weights_in_order(towers, blocks, act, every_weight_in_order):
    own = small(towers, act)
    assert all(
        linear.ordered for block in own._text_blocks() for linear in (*block.inputs, block.out, block.up, block.down)
    )
    texts = grown(own, blocks)
    got, gradients = with_gradients(texts(), texts)
    expected, theirs = with_gradients(run_whole(own, texts), texts)
    assert (got - expected).abs().max() < 1e-5
    assert apart(gradients, theirs) < 1e-4
    again = with_gradients(texts(), texts)[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_an_order_is_for_large_weights_in_single_precision(towers):
    weight = torch.zeros(512, 512)
    assert prefix.FrozenLinear(weight, weight[0], torch.float32).ordered == torch.backends.mkldnn.is_available()
    assert not prefix.FrozenLinear(weight, weight[0], torch.float64).ordered
    assert not prefix.FrozenLinear(weight, weight[0], torch.bfloat16).ordered
    assert not prefix.FrozenLinear(weight.to("meta"), weight[0].to("meta"), torch.float32).ordered
    assert not prefix.FrozenLinear(weight[:8], weight[0, :8], torch.float32).ordered
    assert not any(block.up.ordered for block in small(towers)._text_blocks())


def test_weights_in_order_that_change_are_seen(towers, every_weight_in_order):
    test_weights_that_change_are_seen(towers)


def test_a_prefix_longer_than_any_name_is_cut(towers):
    texts = grown(small(towers), (11, 5, 0), [("ring", "red"), ("red star", "blue ring")])
    assert texts._tree.pieces.shape == (3 + 2 * 2 + 4, 4)
    torch.testing.assert_close(texts(), run_whole(texts._towers, texts), atol=1e-5, rtol=0)


def test_every_token_stands_in_one_place(towers):
    tree = grown(small(towers), (4, 3, 2))._tree
    assert torch.equal(tree.pieces.flatten()[tree.places], torch.arange(len(tree.places)))
    assert tree.mask.isfinite().any(-1).all(), "a place that sees nothing has no softmax"


def test_weights_that_change_are_seen(towers):
    own = small(towers)
    texts = grown(own, (4, 0, 2))
    before = texts()
    with torch.no_grad():
        own._model.text_model.encoder.layers[1].self_attn.k_proj.weight.mul_(2)
    assert (texts() - before).abs().max() > 1e-3
    torch.testing.assert_close(texts(), run_whole(own, texts), atol=1e-5, rtol=0)


def test_a_tree_stands_still_while_its_classes_do(towers):
    """So that its step can be recorded: every shape and index of a step is that of the step before."""
    texts = grown(small(towers), (4, 3, 2))
    tree, blocks = texts._tree, texts._towers._text_blocks()
    for _ in range(2):
        texts().sum().backward()
        with torch.no_grad():
            texts.shared -= 0.1 * texts.shared.grad
    assert texts._tree is tree
    assert texts._towers._text_blocks() is blocks


def test_the_same_gradient_every_time(towers):
    texts = grown(small(towers), (4, 3, 2))
    first, again = (with_gradients(texts(), texts)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_gradient_of_a_weight_is_made(towers):
    texts = grown(small(towers), (4, 3, 2))
    texts().sum().backward()
    assert all(parameter.grad is None for parameter in texts._towers._model.parameters())


def test_in_bfloat16_the_texts_stay_near_and_come_out_in_float32(towers):
    reduced = small(towers, precision="bfloat16")
    texts = grown(reduced, (4, 3, 2))
    assert texts().dtype == torch.float32
    exact = grown(small(towers), (4, 3, 2))()
    assert 1e-4 < (texts() - exact).norm() / exact.norm() < 0.05
    assert (texts() - exact).norm() < 2 * (run_whole(reduced, texts) - exact).norm()


@pytest.mark.parametrize(("shared", "task", "per_class"), BLOCKS, ids=str)
def test_the_tokens_counted_are_those_run(towers, shared, task, per_class):
    texts = grown(towers, (shared, task, per_class))
    before = towers.passes["text_tokens"]
    texts()
    names = [name.replace("_", " ") for names in TASKS for name in names]
    ran = 1 + shared + 3 * task + sum(per_class + len(towers.tokens(f"{name}.")) + 1 for name in names)
    assert towers.passes["text_tokens"] - before == ran


def test_texts_of_frozen_tasks_are_not_run_again(towers):
    texts = grown(towers, (4, 3, 2), freeze_old=True)
    kept = texts.cached.clone()
    before = towers.passes["text_tokens"]
    assert torch.equal(texts()[:3], kept)
    names = [name.replace("_", " ") for name in TASKS[2]]
    assert towers.passes["text_tokens"] - before == 8 + sum(2 + len(towers.tokens(f"{name}.")) + 1 for name in names)
    torch.testing.assert_close(texts()[3:], run_whole(towers, texts)[3:], atol=1e-5, rtol=0)


def test_a_name_that_does_not_fit_is_refused_when_it_arrives(towers):
    with pytest.raises(ConfigError, match=r"class 'red .*need \d+ tokens, the text tower takes 32"):
        grown(towers, (16, 0, 0), [("ring", "red " * 20)])
