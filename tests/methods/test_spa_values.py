"""Every switch of SPA by the value that it gives, written out image by image."""

from __future__ import annotations

import pytest
import torch
from teaching import taught

from cairn.config import with_settings
from cairn.data.loading import Loader
from cairn.maths.alignment import aligned
from cairn.maths.similarity import unit
from cairn.methods import spa
from cairn.methods.catalogue import METHODS
from cairn.training.context import Context
from cairn.training.seeds import Seeds


def learned(towers, tasks, *assignments):
    entry = METHODS["spa"]
    quick = ("schedule.epochs=1", "schedule.batch=8", "local.patches=6", "local.best=3", "local.among=seen")
    config = with_settings(entry.default_config(towers), [*quick, *assignments])
    return taught(entry.build(towers, config, seed=1), tasks)


def pixels_of(images, towers):
    return torch.cat([pixels for pixels, _ in Loader(images, towers.prepare, towers.pixels).ordered()])


def local_feature(p, tokens, priors, how):
    """unit(sum_c prior_c sum_i share_ci p_i) of one image's patches."""
    v = torch.zeros(p.shape[1])
    for c, prior in priors.items():
        uniform = torch.full((1, 1, len(tokens[c])), 1 / len(tokens[c]))
        found = aligned((tokens[c] @ p.T)[None, None], uniform, **how)
        for patch, share in zip(found.chosen[0, 0].tolist(), found.share[0, 0].tolist(), strict=True):
            v += prior * share * p[patch]
    return v / v.norm()


HOW = {"patches": 6}
PLAN = ("patches", "transport", "guide", "eps", "iterations")
SWITCHES = {
    "local.weight=1": {},
    "local.weight=2": {"weight": 2.0},
    "local.patches=null": {"patches": None},
    "local.patches=3": {"patches": 3},
    "local.transport=false": {"transport": False},
    "local.guide=mean": {"guide": "mean"},
    "local.eps=1": {"eps": 1.0},
    "local.iterations=1": {"iterations": 1},
    "local.attention=native": {"attention": "native"},
    "local.tokens=words": {"tokens": "words"},
    "local.best=1": {"best": 1},
    "local.best=null": {"best": 6},
    "descriptions=template": {"descriptions": "template"},
    "local.among=first": {"among": 2},
}


@pytest.mark.parametrize(("switch", "means"), SWITCHES.items())
def test_scores_before_training_are_those_written_out(towers, small_stream, switch, means):
    own = {
        "weight": 1.0,
        "attention": "value",
        "tokens": "sentences",
        "best": 3,
        "descriptions": "data",
        "among": 6,
    } | means
    how = HOW | {key: value for key, value in means.items() if key in PLAN}
    method = learned(towers, small_stream.tasks, "schedule.epochs=0", switch)
    names, templates = small_stream.class_names, small_stream.tasks[0].templates
    if own["descriptions"] == "data":
        said = [small_stream.tasks[0].descriptions.classes[name].sentences for name in names]
    else:
        said = [[template.replace("{}", name) for template in templates] for name in names]
    read = towers.text if own["tokens"] == "sentences" else lambda sentences: torch.cat(towers.word_tokens(sentences))
    tokens = [unit(read(list(sentences))) for sentences in said]

    s, pixels = towers.logit_scale, pixels_of(small_stream.tests[0], towers)
    z, p = towers.image_and_patches(pixels, own["attention"])
    z, p = unit(z), unit(p.flatten(0, 1)).view_as(p)
    cls = z @ towers.class_texts(names, templates).T
    v = []
    for cosines, patches in zip(cls, p, strict=True):
        likely = cosines[: own["among"]].topk(min(own["best"], own["among"]))
        shares = torch.softmax(s * likely.values, 0).tolist()
        v.append(local_feature(patches, tokens, dict(zip(likely.indices.tolist(), shares, strict=True)), how))
    meant = torch.stack([unit(own_tokens.mean(0, keepdim=True))[0] for own_tokens in tokens])
    expected = s * (cls + own["weight"] * torch.stack(v) @ meant.T)
    torch.testing.assert_close(method.scores(method.embed(pixels)), expected, atol=2e-3, rtol=1e-4)


def test_without_weight_or_training_it_is_zero_shot(towers, small_stream):
    method = learned(towers, small_stream.tasks, "schedule.epochs=0", "local.weight=0")
    pixels = pixels_of(small_stream.tests[0], towers)
    T = towers.class_texts(small_stream.class_names, small_stream.tasks[0].templates)
    expected = towers.logit_scale * unit(towers.image(pixels)) @ T.T
    torch.testing.assert_close(method.scores(method.embed(pixels)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("guide", ["image", "label"])
def test_who_guides_in_training_decides_what_is_kept(towers, small_stream, guide):
    """The kept mean of the local feature is that of a class's own patches where the label guides."""
    task, d, s = small_stream.tasks[0], towers.dim, towers.logit_scale
    method = learned(towers, [task], f"local.training_guide={guide}")
    z, p = towers.image_and_patches(pixels_of(task.train, towers), "value")
    z, p = unit(z), unit(p.flatten(0, 1)).view_as(p)
    tokens = [unit(towers.text(list(task.descriptions.classes[name].sentences))) for name in task.names]
    cls = s * z @ towers.class_texts(task.names, task.templates).T
    rows = [[], []]
    for c, logits, patches in zip(task.train.labels.tolist(), cls, p, strict=True):
        shares = {c: 1.0} if guide == "label" else dict(enumerate(torch.softmax(logits, 0).tolist()))
        rows[c].append(local_feature(patches, tokens, shares, HOW))
    for c in range(2):
        expected = torch.stack(rows[c]).double().mean(0)
        torch.testing.assert_close(method.memory.mean(c)[d:], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("replay", "per_class"), [("0", 0), ("3", 3), ("null", 4)])
def test_replay_is_the_number_of_draws_per_old_class_and_batch(towers, small_stream, monkeypatch, replay, per_class):
    """null: as many as of a new class in an even batch, 8 // 2."""
    batches, plain = [], spa.fit

    def fit(loss, parameters, given, *rest, **named):
        batches.append(given)
        return plain(loss, parameters, given, *rest, **named)

    monkeypatch.setattr(spa, "fit", fit)
    learned(towers, small_stream.tasks, f"replay={replay}", "prior=0")
    for task, given in enumerate(batches):
        for _, y in next(given.epochs([torch.Generator().manual_seed(0)])):
            counts = y.bincount(minlength=6)[: 2 * task]
            assert counts.tolist() == [per_class] * (2 * task)


@pytest.mark.parametrize(("among", "moves"), [("first", False), ("seen", True)])
def test_later_classes_do_not_move_the_local_feature(towers, small_stream, monkeypatch, among, moves):
    """Where several of the likeliest classes have a share in it; else few images show that it moves."""
    monkeypatch.setattr(towers, "logit_scale", 5.0)
    first, *later = small_stream.tasks
    method = learned(towers, [first], f"local.among={among}")
    pixels = pixels_of(first.train, towers)
    before = method.memory_rows(method.embed(pixels))
    for c in first.classes:
        mean = before[torch.as_tensor(first.train.labels) == c].double().mean(0)
        torch.testing.assert_close(method.memory.mean(c), mean, atol=1e-5, rtol=1e-4)
    for task in later:
        method.learn(task, Context(Seeds(1)))
    after = method.memory_rows(method.embed(pixels))
    assert torch.equal(before[:, : towers.dim], after[:, : towers.dim])
    assert ((before - after).abs().max() > 1e-2) == moves
    if not moves:
        torch.testing.assert_close(before, after)


def test_a_guide_that_is_forgotten_chooses_no_patch(towers, small_stream):
    first = small_stream.tasks[0]
    method, features = learned(towers, small_stream.tasks, "local.among=first"), []
    pixels = pixels_of(first.train, towers)
    p = towers.image_and_patches(pixels, "value")[1]
    p = unit(p.flatten(0, 1)).view_as(p)
    for c in (0, 0, 0):  # the first guide, the other one, and the class that took its place
        method.forget(c)
        assert method.guides == 1
        alone = torch.stack([local_feature(rows, method._tokens, {0: 1.0}, HOW) for rows in p])
        found = method.memory_rows(method.embed(pixels))[:, towers.dim :]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
        features.append(found)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_guides_are_kept_and_those_of_before_are_all_classes(towers, small_stream):
    method = learned(towers, small_stream.tasks, "local.among=first")
    state, features = method.state_dict(), method.embed(pixels_of(small_stream.tests[0], towers))
    same = learned(towers, [], "local.among=first")
    same.load_state_dict(state)
    assert same.guides == 2
    torch.testing.assert_close(same.scores(features), method.scores(features))

    held = METHODS["spa"].config().model_dump()
    assert held["local"].pop("among") == "first"
    assert METHODS["spa"].completed(held)["local"]["among"] == "seen"
    old = learned(towers, [], "local.among=seen")
    old.load_state_dict({key: value for key, value in state.items() if key != "guides"})
    seen = learned(towers, [], "local.among=seen")
    seen.load_state_dict(state)
    torch.testing.assert_close(old.scores(features), seen.scores(features))
