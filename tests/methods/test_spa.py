"""SPA: what is chosen, what trains, and what each switch turns off."""

from __future__ import annotations

import json

import pytest
import torch
from teaching import taught

from cairn.config import with_settings
from cairn.data.loading import Loader
from cairn.errors import ConfigError, DataError
from cairn.maths.alignment import aligned, local_scores
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.parts.projector import Projector
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

FAST = ("schedule.epochs=1", "schedule.batch=8")


def build(towers, *assignments):
    entry = METHODS["spa"]
    config = with_settings(entry.default_config(towers), [*FAST, *assignments])
    return entry.build(towers, config, seed=1)


def learned(towers, stream, *assignments):
    return taught(build(towers, *assignments), stream.tasks)


def pixels_of(stream, towers, task=0):
    return next(iter(Loader(stream.tests[task], towers.prepare, towers.pixels)))[0]


def starting_point(towers, stream, *assignments):
    """A method without training, its scores of some images, and what they are made of, by hand."""
    method = learned(towers, stream, "schedule.epochs=0", "local.among=seen", *assignments)
    pixels = pixels_of(stream, towers)
    z, p = towers.image_and_patches(pixels, "value")
    z, p = unit(z), unit(p.flatten(0, 1)).view_as(p)
    said = torch.stack([unit(towers.text(sentences)) for sentences in method.sentences])
    return method, method.scores(method.embed(pixels)), z, p, said, z @ method.anchors.T


def test_it_starts_at_zero_shot_plus_the_likeness_of_the_local_feature(towers, small_stream):
    method, found, _, p, said, cls = starting_point(towers, small_stream, "local.best=3", "local.patches=16")
    s, v = towers.logit_scale, torch.zeros(len(p), p.shape[2])
    likely = cls.topk(3, dim=1)
    for i, rows in enumerate(p):
        for c, share in zip(likely.indices[i].tolist(), torch.softmax(s * likely.values[i], 0), strict=True):
            alignment = aligned((said[c] @ rows.T)[None, None], torch.full((1, 1, 6), 1 / 6), patches=16)
            v[i] += share * alignment.share[0, 0] @ rows[alignment.chosen[0, 0]]
    expected = s * (cls + unit(v) @ unit(said.mean(1)).T)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert method.memory.dim == 2 * towers.dim


def test_the_plans_own_score_is_added_as_it_is(towers, small_stream):
    changes = ("local.score=plan", "local.best=null", "local.weight=0.5", "local.patches=16")
    method, found, _, p, said, cls = starting_point(towers, small_stream, *changes)
    local = local_scores(p, said, torch.full(said.shape[:2], 1 / 6), patches=16)
    torch.testing.assert_close(found, towers.logit_scale * (cls + 0.5 * local), atol=1e-4, rtol=1e-4)
    assert local.std() > 1e-3
    assert method.memory.dim == towers.dim


def test_old_classes_are_drawn_in_both_branches_on_the_sphere(towers, small_stream):
    method = learned(towers, small_stream)
    drawn = method.on_sphere(method.memory.draw(5, torch.Generator().manual_seed(0))[0])
    for half in drawn.split(towers.dim, dim=1):
        torch.testing.assert_close(half.norm(dim=1), torch.ones(len(drawn)))


def test_every_training_image_passes_the_tower_once(towers, small_stream):
    before = towers.passes["images"]
    learned(towers, small_stream, "schedule.epochs=3")
    assert towers.passes["images"] - before == sum(len(task.train) for task in small_stream.tasks)


def test_finished_projectors_stand_still_and_are_one_matrix():
    projector = Projector(4)
    x = unit(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(projector(x), x)
    total = torch.zeros(4, 4)
    for task in range(3):
        projector.grow()
        with torch.no_grad():
            projector.current += torch.randn(4, 4, generator=torch.Generator().manual_seed(task))
        total += projector.current.detach()
        torch.testing.assert_close(projector(x), unit(x + x @ total.T))
        assert projector.finished.requires_grad is False


@pytest.mark.parametrize(
    "switch",
    [
        "local.weight=0", "local.patches=null", "local.transport=false", "schedule.epochs=0", "replay=0",
        "local.attention=native", "local.patches=4", "local.best=1", "local.eps=1", "local.weight=2",
        "local.tokens=words", "local.guide=mean", "descriptions=template", "local.score=plan",
        "local.training_guide=label", "local.among=seen",
    ],
)  # fmt: skip
def test_every_switch_changes_the_scores_and_nothing_breaks(towers, small_stream, switch):
    pixels = pixels_of(small_stream, towers)
    plain, other = (learned(towers, small_stream, *changes) for changes in ((), (switch,)))
    a, b = (method.scores(method.embed(pixels)) for method in (plain, other))
    assert a.shape == b.shape
    assert torch.isfinite(b).all()
    assert not torch.allclose(a, b, atol=1e-3)


def test_without_patches_no_patch_is_computed(towers, small_stream, monkeypatch):
    monkeypatch.setattr(type(towers), "image_and_patches", lambda *_: pytest.fail("patches were asked for"))
    method = learned(towers, small_stream, "local.weight=0")
    assert method.embed(pixels_of(small_stream, towers)).shape[1] == towers.dim


def test_descriptions_from_a_file_must_cover_the_classes(towers, small_stream, tmp_path):
    names = small_stream.class_names
    entries = {name: {"sentences": ["the colour red", "a round disc"]} for name in names[:-1]}
    file = tmp_path / "said.json"
    file.write_text(json.dumps({"schema_version": 1, "classes": entries}))
    method = build(towers, f"descriptions={file}")
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    assert method.sentences == [("the colour red", "a round disc")] * 2
    with pytest.raises(DataError, match=f"none for 1 of 2 classes: '{names[-1]}'"):
        method.learn(small_stream.tasks[-1], Context(Seeds(1)))


def test_templates_in_place_of_descriptions_are_said(towers, small_stream):
    events = []
    method = build(towers, "descriptions=template")
    method.learn(small_stream.tasks[0], Context(Seeds(1), Log(keep=events.append)))
    assert any("descriptions=template" in event.get("text", "") for event in events)


def test_patches_of_a_features_file_are_refused():
    flat = FeatureTowers(name="f", dim=4, logit_scale=1.0, fingerprint="f", names=(), text=None)
    with pytest.raises(ConfigError, match=r"set local\.weight=0"):
        build(flat, "local.weight=0.5")
