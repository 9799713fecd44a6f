"""Soft prompts and the other text sides."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from cairn.errors import ConfigError
from cairn.towers.features import FeatureTowers
from cairn.towers.prompts import Prompts, Residual, Templates, prompt_embeddings

NAMES = ("striped red star", "plain_blue_circle", "ring")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def word_context(towers, words="a photo of a"):
    return towers.token_embeddings(torch.tensor(towers.tokens(words)))[None]


def test_a_context_of_real_words_is_the_stock_text_forward(towers):
    got = prompt_embeddings(towers, word_context(towers), NAMES, [0, 0, 0])
    ids = [[towers.bos, *towers.tokens(f"a photo of a {name.replace('_', ' ')}."), towers.eos] for name in NAMES]
    padded = torch.tensor([row + [1] * (towers.context_length - len(row)) for row in ids])
    with torch.no_grad():
        expected = towers._model.get_text_features(padded).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_in_the_context_is_the_difference_quotient(towers):
    context = 0.5 * torch.randn(2, 3, towers.width, generator=rng())
    direction = torch.randn(context.shape, generator=rng(1))
    weight = torch.randn(3, towers.dim, generator=rng(2))

    def value(x):
        return (weight * prompt_embeddings(towers, x, NAMES, [0, 1, 0])).sum()

    moving = context.clone().requires_grad_(True)
    value(moving).backward()
    h = 1e-2
    with torch.no_grad():
        quotient = (value(context + h * direction) - value(context - h * direction)) / (2 * h)
    torch.testing.assert_close((moving.grad * direction).sum(), quotient, rtol=2e-2, atol=1e-2)


def test_a_name_that_does_not_fit_is_named_with_a_remedy(towers):
    context = torch.zeros(1, 16, towers.width)
    with pytest.raises(
        ConfigError, match=r"class 'red .*need \d+ tokens, the text tower takes 32; lower stage2.text.length"
    ):
        prompt_embeddings(towers, context, ["ring", "red " * 20], [0, 0])


@pytest.mark.parametrize(("scope", "blocks"), [("shared", [1, 1]), ("task", [1, 2]), ("class", [2, 3])])
def test_blocks_are_born_as_the_scope_says(towers, scope, blocks):
    texts = Prompts(length=4, scope=scope).build(towers)
    texts.grow(NAMES[:2], torch.zeros(2, towers.dim), rng())
    assert sum(map(len, texts.blocks)) == blocks[0]
    first = texts().detach()
    texts.grow(NAMES[2:], torch.zeros(1, towers.dim), rng(1))
    assert sum(map(len, texts.blocks)) == blocks[1]
    assert texts().shape == (3, towers.dim)
    torch.testing.assert_close(texts()[:2].detach(), first, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(texts().norm(dim=-1), torch.ones(3))


def test_only_the_block_of_a_class_moves_its_text(towers):
    texts = Prompts(length=4, scope="class").build(towers)
    texts.grow(NAMES, torch.zeros(3, towers.dim), rng())
    before = texts().detach()
    with torch.no_grad():
        texts.blocks[0][1] += 0.1
    moved = (texts().detach() - before).norm(dim=-1)
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() < 1e-6


def test_frozen_blocks_are_not_offered_for_training(towers):
    for freeze, count in ((False, 2), (True, 1)):
        texts = Prompts(length=4, scope="task", freeze_old=freeze).build(towers)
        texts.grow(NAMES[:2], torch.zeros(2, towers.dim), rng())
        texts.grow(NAMES[2:], torch.zeros(1, towers.dim), rng(1))
        assert len(texts.trainable()) == count


def test_a_block_can_start_from_words(towers):
    texts = Prompts(length=4, init="a photo of a").build(towers)
    texts.grow(NAMES, torch.zeros(3, towers.dim), rng())
    expected = towers.class_texts(NAMES, ("a photo of a {}.",))
    torch.testing.assert_close(texts().detach(), expected, atol=1e-5, rtol=1e-5)


def test_residual_texts_start_at_their_anchors_and_keep_old_rows():
    anchors = normalize(torch.randn(3, 8, generator=rng()), dim=-1)
    texts = Residual().build(None)
    texts.grow(NAMES[:2], anchors[:2], rng())
    torch.testing.assert_close(texts().detach(), anchors[:2])
    with torch.no_grad():
        texts.residuals[0][0] += torch.ones(8)
    texts.grow(NAMES[2:], anchors[2:], rng())
    torch.testing.assert_close(texts().detach()[0], normalize(anchors[0] + 1, dim=-1))
    torch.testing.assert_close(texts().detach()[1:], anchors[1:])


@pytest.mark.parametrize("choice", [Prompts(length=4, scope="class"), Residual(), Templates()], ids=lambda c: c.kind)
def test_state_round_trips(towers, choice):
    texts = choice.build(towers)
    texts.grow(NAMES[:2], normalize(torch.randn(2, towers.dim, generator=rng()), dim=-1), rng())
    texts.grow(NAMES[2:], normalize(torch.randn(1, towers.dim, generator=rng(1)), dim=-1), rng(1))
    with torch.no_grad():
        for parameter in texts.parameters():
            parameter += 0.1
    fresh = choice.build(towers)
    fresh.restore(texts.state())
    assert torch.equal(fresh(), texts())
    assert len(fresh.trainable()) == len(texts.trainable())


def test_prompts_without_a_text_tower_are_refused():
    flat = FeatureTowers(name="f", dim=4, logit_scale=1.0, fingerprint="f", names=(), text=None)
    with pytest.raises(ConfigError, match=r"take stage2\.text=residual"):
        Prompts().build(flat)
