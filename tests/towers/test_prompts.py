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
    return towers.token_embeddings(torch.tensor(towers.tokens(words))).expand(3, -1, -1)


def test_a_context_of_real_words_is_the_stock_text_forward(towers):
    got = prompt_embeddings(towers, word_context(towers), NAMES)
    ids = [[towers.bos, *towers.tokens(f"a photo of a {name.replace('_', ' ')}."), towers.eos] for name in NAMES]
    padded = torch.tensor([row + [1] * (towers.context_length - len(row)) for row in ids])
    with torch.no_grad():
        expected = towers._model.get_text_features(padded).pooler_output
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_in_the_context_is_the_difference_quotient(towers):
    context = 0.5 * torch.randn(3, 4, towers.width, generator=rng())
    direction = torch.randn(context.shape, generator=rng(1))
    weight = torch.randn(3, towers.dim, generator=rng(2))

    def value(x):
        return (weight * prompt_embeddings(towers, x, NAMES)).sum()

    moving = context.clone().requires_grad_(True)
    value(moving).backward()
    h = 1e-2
    with torch.no_grad():
        quotient = (value(context + h * direction) - value(context - h * direction)) / (2 * h)
    torch.testing.assert_close((moving.grad * direction).sum(), quotient, rtol=2e-2, atol=1e-2)


def test_a_name_that_does_not_fit_is_named_with_a_remedy(towers):
    context = torch.zeros(2, 16, towers.width)
    with pytest.raises(
        ConfigError, match=r"class 'red .*need \d+ tokens, the text tower takes 32; lower stage2.text.shared"
    ):
        prompt_embeddings(towers, context, ["ring", "red " * 20])


SHARED, TASK = {"shared": 4, "per_class": 0}, {"task": 4, "per_class": 0}
CLASS = {"per_class": 4}
ALL = {"shared": 4, "task": 2, "per_class": 2}


def grown(towers, **choice):
    """Two tasks: two classes, then one."""
    texts = Prompts(**choice).build(towers)
    texts.grow(NAMES[:2], torch.zeros(2, towers.dim), rng())
    first = texts().detach()
    texts.grow(NAMES[2:], torch.zeros(1, towers.dim), rng(1))
    return texts, first


@pytest.mark.parametrize("blocks", [SHARED, TASK, CLASS, ALL], ids=["shared", "task", "class", "all"])
@pytest.mark.parametrize("freeze", [False, True])
def test_growing_leaves_old_texts_where_they_were(towers, blocks, freeze):
    texts, first = grown(towers, **blocks, freeze_old=freeze)
    assert texts().shape == (3, towers.dim)
    torch.testing.assert_close(texts()[:2].detach(), first, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(texts().norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize(
    ("blocks", "shake", "moves"),
    [
        (ALL, lambda t: t.shared, [True, True, True]),
        (ALL, lambda t: t.task[0], [True, True, False]),
        (ALL, lambda t: t.per_class[0][1], [False, True, False]),
        (ALL, lambda t: t.per_class[1], [False, False, True]),
    ],
    ids=["shared", "task", "class", "later class"],
)
def test_a_block_moves_the_texts_that_use_it(towers, blocks, shake, moves):
    texts, _ = grown(towers, **blocks)
    before = texts().detach()
    with torch.no_grad():
        block = shake(texts)  # not a constant: layer norm would take that away
        block.add_(0.2 * torch.randn(block.shape, generator=rng(7)))
    moved = (texts().detach() - before).norm(dim=-1)
    assert ((moved > 1e-3) == torch.tensor(moves)).all()
    assert moved[~torch.tensor(moves)].numel() == 0 or moved[~torch.tensor(moves)].max() < 1e-6


def test_frozen_texts_stay_and_their_blocks_are_not_trained(towers):
    texts, first = grown(towers, **ALL, freeze_old=True)
    assert len(texts.trainable()) == 3  # shared, the last task's, its classes'
    assert len(grown(towers, **ALL)[0].trainable()) == 5
    before = dict(towers.passes)
    with torch.no_grad():
        for parameter in texts.trainable():
            parameter.add_(0.2)
    torch.testing.assert_close(texts()[:2].detach(), first, atol=0, rtol=0)
    texts().sum().backward()
    assert texts.task[0].grad is None
    assert texts.task[1].grad.abs().max() > 0
    tokens = towers.passes["text_tokens"] - before["text_tokens"]
    assert tokens == 2 * (1 + 8 + len(towers.tokens(NAMES[2] + ".")) + 1)  # the new class alone, twice


def test_residuals_of_all_classes_train_on_frozen_prompts(towers):
    texts, first = grown(towers, **ALL, freeze_old=True, residual=5.0)
    assert len(texts.trainable()) == 3 + 2  # as above, and the residuals of both tasks
    with torch.no_grad():
        texts.residuals[0][1] += 3.0
    s = towers.logit_scale
    torch.testing.assert_close(texts().detach()[0], first[0])
    torch.testing.assert_close(texts().detach()[1], normalize(first[1] + 5 * 3 / s, dim=-1))
    texts.grow(["ring"], torch.zeros(1, towers.dim), rng(2))  # what is cached is the prompt, not its sum with r
    torch.testing.assert_close(texts().detach()[1], normalize(first[1] + 5 * 3 / s, dim=-1))


def test_no_block_at_all_is_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        Prompts(per_class=0)


def test_a_block_can_start_from_words(towers):
    texts = Prompts(shared=4, per_class=0, init="a photo of a").build(towers)
    texts.grow(NAMES, torch.zeros(3, towers.dim), rng())
    expected = towers.class_texts(NAMES, ("a photo of a {}.",))
    torch.testing.assert_close(texts().detach(), expected, atol=1e-5, rtol=1e-5)


def test_residual_texts_start_at_their_anchors_and_keep_old_rows(towers):
    anchors = normalize(torch.randn(3, 8, generator=rng()), dim=-1)
    texts = Residual().build(towers)
    texts.grow(NAMES[:2], anchors[:2], rng())
    torch.testing.assert_close(texts().detach(), anchors[:2])
    with torch.no_grad():
        texts.residuals[0][0] += towers.logit_scale * torch.ones(8)
    texts.grow(NAMES[2:], anchors[2:], rng())
    torch.testing.assert_close(texts().detach()[0], normalize(anchors[0] + 1, dim=-1))
    torch.testing.assert_close(texts().detach()[1:], anchors[1:])


@pytest.mark.parametrize(
    "choice",
    [Prompts(**ALL, freeze_old=True), Prompts(**ALL, residual=2.0), Residual(), Templates()],
    ids=["frozen", "prompts", "residual", "templates"],
)
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
