"""ENGINE: its losses, its noise, its re-ranking and its altered images, each against the formula in loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import rows, taught
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cairn.config import with_settings
from cairn.data.augment import LIGHT, SMALLEST, view
from cairn.data.images import Subset
from cairn.data.loading import Loader
from cairn.errors import ConfigError, DataError, ResultError
from cairn.maths.discriminant import linear_discriminant
from cairn.maths.similarity import unit
from cairn.methods import engine
from cairn.methods.catalogue import METHODS
from cairn.methods.parts.described import sentences_of
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

FAST = ("schedule.epochs=1", "schedule.batch=16")


def build(towers, *assignments):
    entry = METHODS["engine"]
    config = with_settings(entry.default_config(towers), [*FAST, *assignments])
    return entry.build(towers, config, seed=1)


def learned(towers, tasks, *assignments):
    return taught(build(towers, *assignments), tasks)


def correlated(rng, n, d):
    mixing = rng.normal(size=(d, d)) * np.geomspace(1, 0.1, d)
    return torch.tensor(rng.normal(size=d) + rng.normal(size=(n, d)) @ mixing.T, dtype=torch.float32)


# --- training ---------------------------------------------------------------------------------------------------------


def units(method) -> tuple[Tensor, Tensor]:
    """The sums of all linear maps, visual and textual."""
    made = method.units
    return tuple(
        torch.eye(method.towers.dim) + made[side].finished + made[side].current.detach()
        for side in ("visual", "textual")
    )


def softmax_share(a, rows, i):
    """-log of the share of row i in the softmax of a . rows."""
    return -(torch.stack([a @ row for row in rows])).log_softmax(0)[i]


@pytest.mark.parametrize("kind", ["contrast", "cross_entropy"])
@pytest.mark.parametrize("form", ["images", "embeddings"])
def test_the_loss_is_the_sum_of_its_three_parts(form, kind, towers, small_stream, flat, stream, monkeypatch):
    seen = {}

    def spy(loss, parameters, batches, *_):
        rng = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=rng)
        x, y = next(next(batches.epochs([rng])))
        seen.update(x=x, y=y, value=loss(x, y).item())

    world, tasks = (towers, small_stream.tasks) if form == "images" else (flat, stream.tasks)
    method = learned(world, tasks[:1], "views=2", "text_weight=0.5", "image_weight=2", f"loss={kind}")
    monkeypatch.setattr(engine, "fit", spy)
    method.learn(tasks[1], Context(Seeds(1)))
    (A, B), s, d = units(method), world.logit_scale, world.dim
    said = unit(torch.stack([sum(unit(own)) for own in method.sentences]))
    x, y, total = seen["x"], seen["y"].tolist(), 0.0
    z, first, second = unit(x[:, :d] @ A.T), x[:, d : 2 * d], x[:, 2 * d :]
    first, second, T = unit(first), unit(second), unit(method.anchors @ B.T)
    for i in range(len(x)):
        if kind == "contrast":
            others = [T[c] for c in y]
            L_c = (softmax_share(s * z[i], others, i) + softmax_share(s * T[y[i]], z, i)) / 2
            L_t = softmax_share(T[y[i]], [said[c] for c in y], i)
            L_i = (softmax_share(z[i], first, i) + softmax_share(z[i], second, i)) / 2
        else:
            L_c = softmax_share(s * z[i], T, y[i])
            L_t = -cosine_similarity(T[y[i]], said[y[i]], dim=0)
            L_i = -sum(cosine_similarity(z[i], other[i], dim=0) for other in (first, second)) / 2
        total += (L_c + 0.5 * L_t + 2 * L_i).item()
    assert seen["value"] == pytest.approx(total / len(x), rel=1e-4)
    assert seen["y"].unique().tolist() == [0, 1, 2, 3]


def test_a_batch_has_fresh_noisy_means_of_every_old_class(flat, stream):
    rng = np.random.default_rng(0)
    x, y, old = correlated(rng, 10, 12), torch.arange(10) % 2 + 3, correlated(rng, 3, 6)
    batches = engine._Batches(x, y, old, 0.3, 4, 2)
    found = list(next(batches.epochs([torch.Generator().manual_seed(0)])))
    assert len(found) == len(batches) == 3
    assert sorted(tuple(row.tolist()) for b, _ in found for row in b[:-6]) == sorted(tuple(row.tolist()) for row in x)
    for b, names in found:
        assert names[-6:].tolist() == [0, 1, 2, 0, 1, 2]
        ratio = (b[-6:] - old.repeat(2, 2)).norm(dim=1) / old.repeat(2, 2).norm(dim=1)
        assert (ratio > 0.05).all()
        assert (ratio < 1).all()
    assert not torch.equal(found[0][0][-6:], found[1][0][-6:])
    left = list(next(batches.epochs([torch.Generator().manual_seed(0)], skip=1)))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(left, found[1:], strict=True))


def test_noise_is_measured_by_the_length_of_what_it_is_added_to():
    x = torch.cat([torch.full((4000, 8), 0.1), torch.full((4000, 8), 30.0)])
    noise = engine.noisy(x, 0.25, torch.Generator().manual_seed(0)) - x
    for half, length in ((noise[:4000], 0.1 * 8**0.5), (noise[4000:], 30 * 8**0.5)):
        torch.testing.assert_close((half**2).sum(1).mean().sqrt(), torch.tensor(0.25 * length), rtol=0.02, atol=0)
        covariance = half.T @ half / len(half)
        torch.testing.assert_close(covariance, torch.eye(8) * (0.25 * length) ** 2 / 8, atol=0.01 * length**2, rtol=0)
    assert torch.equal(engine.noisy(x, 0.0, torch.Generator()), x)


def test_the_means_are_those_of_unit_embeddings_and_units_of_finished_tasks_stand_still(flat, stream):
    method = learned(flat, stream.tasks[:1])
    finished = units(method)
    method.learn(stream.tasks[1], Context(Seeds(1)))
    for side, before in zip(("visual", "textual"), finished, strict=True):
        torch.testing.assert_close(torch.eye(16) + method.units[side].finished, before, atol=0, rtol=0)
        assert method.units[side].current.abs().max() > 0
    x = unit(rows(stream.tasks[1].train))
    torch.testing.assert_close(method.means.means[2:], torch.stack([x[:30].mean(0), x[30:].mean(0)]))


def test_text_weight_brings_class_texts_to_their_descriptions(towers, small_stream):
    nearness = []
    for weight in (0, 5):
        settings = (f"text_weight={weight}", "schedule.epochs=10", "loss=cross_entropy")
        method = learned(towers, small_stream.tasks[:1], *settings)
        T = method.units["textual"](method.anchors)
        nearness.append((T * method._described()).sum(1).mean().item())
    assert nearness[1] > nearness[0] + 0.005


def test_text_weight_tells_class_texts_apart_by_their_descriptions(towers, small_stream):
    """A contrast says nothing of how near a text is to its own description, but how much nearer than to the others."""
    margins = []
    for weight in (0, 5):
        method = learned(towers, small_stream.tasks[:1], f"text_weight={weight}", "schedule.epochs=10", "loss=contrast")
        likeness = method.units["textual"](method.anchors) @ method._described().T
        margins.append(
            (likeness.diagonal() - (likeness.sum(1) - likeness.diagonal()) / (len(likeness) - 1)).mean().item()
        )
    assert margins[1] > margins[0] + 0.005


def test_image_weight_brings_images_to_altered_ones(flat, stream):
    nearness = []
    for weight in (0, 20):
        method = learned(flat, stream.tasks[:1], f"image_weight={weight}", "schedule.epochs=10", "loss=cross_entropy")
        x = unit(rows(stream.tasks[0].train))
        nearness.append((method.units["visual"](x) * x).sum(1).mean().item())
    assert nearness[1] > nearness[0]


# --- altered images ---------------------------------------------------------------------------------------------------


def test_a_view_that_leaves_everything_is_the_image(towers, small_stream):
    pixels = next(iter(Loader(small_stream.tests[0], towers.prepare, towers.pixels)))[0]
    as_it_is = torch.tensor([[1.0, 0.5, 0.5, 0.2, 0.5, 0.5]]).repeat(len(pixels), 1)
    torch.testing.assert_close(view(pixels, as_it_is), pixels, atol=1e-4, rtol=0)
    mirrored = as_it_is.clone()
    mirrored[:, 3] = 0.7
    torch.testing.assert_close(view(pixels, mirrored), pixels.flip(3), atol=1e-4, rtol=0)


def test_contrast_and_brightness_are_about_the_mean_of_the_image():
    pixels = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = view(pixels, torch.tensor([[1, 0.5, 0.5, 0.2, 0.75, 0.5], [1, 0.5, 0.5, 0.2, 0.5, 0.0]]))
    mean = pixels[0].mean()
    torch.testing.assert_close(found[0], mean + (1 + LIGHT / 2) * (pixels[0] - mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], pixels[1] - LIGHT, atol=1e-4, rtol=0)


def test_a_crop_is_a_part_of_the_image_of_its_own_shape():
    ramp = torch.linspace(-1, 1, 41).expand(1, 3, 41, 41)
    for across, low, high in ((0.0, -1, -1 + 2 * SMALLEST**0.5), (1.0, 1 - 2 * SMALLEST**0.5, 1)):
        found = view(ramp, torch.tensor([[0.0, across, 0.3, 0.2, 0.5, 0.5]]))
        assert found.shape == ramp.shape
        assert found.min() == pytest.approx(low, abs=0.05)
        assert found.max() == pytest.approx(high, abs=0.05)


def test_every_image_passes_the_tower_once_and_each_altered_copy_too(towers, small_stream):
    before = towers.passes["images"]
    learned(towers, small_stream.tasks, "views=2", "schedule.epochs=0")
    assert towers.passes["images"] - before == 3 * sum(len(task.train) for task in small_stream.tasks)


# --- re-ranking -------------------------------------------------------------------------------------------------------


def test_the_sentence_that_tells_a_class_from_another_speaks_for_it_and_against_the_other():
    rng = np.random.default_rng(1)
    sentences = [unit(correlated(rng, m, 7)) for m in (3, 1, 4)]
    described = unit(torch.stack([own.mean(0) for own in sentences]))
    found = engine.telling(sentences, described)
    for a in range(3):
        for b in range(3):
            margins = [float(said @ described[a] - said @ described[b]) for said in sentences[a]]
            start = sum(len(own) for own in sentences[:a])
            assert margins[found[a, b] - start] == max(margins)
    assert found[1].tolist() == [3, 3, 3]


@pytest.mark.parametrize("candidates", [2, 3, 99])
def test_re_ranking_adds_the_cosine_with_what_tells_a_class_from_the_other_likely_ones(
    towers, small_stream, candidates
):
    method = learned(towers, small_stream.tasks, f"candidates={candidates}", "stat=0", "rerank=0.3")
    pixels = next(iter(Loader(small_stream.tests[1], towers.prepare, towers.pixels)))[0]
    x, (A, B), s = unit(towers.image(pixels)), units(method), towers.logit_scale
    cosines = unit(x @ A.T) @ unit(method.anchors @ B.T).T
    said = torch.cat(method.sentences)
    tells = engine.telling(method.sentences, unit(torch.stack([own.mean(0) for own in method.sentences])))
    R = torch.zeros_like(cosines)
    for i in range(len(x)):
        best = cosines[i].argsort(descending=True)[: min(candidates, 6)].tolist()
        for a in best:
            mean = sum(said[tells[a, b]] for b in best if b != a) / (len(best) - 1)
            R[i, a] = cosine_similarity(x[i], mean, dim=0)
    torch.testing.assert_close(method.scores(method.embed(pixels)), s * (0.3 * R + 0.7 * cosines), atol=1e-4, rtol=1e-4)
    assert (R != 0).sum(1).tolist() == [min(candidates, 6)] * len(x)


def test_one_candidate_is_no_re_ranking(flat, stream):
    method = learned(flat, stream.tasks, "candidates=1", "stat=0")
    x, (A, B) = unit(rows(stream.tests[0])), units(method)
    expected = flat.logit_scale * unit(x @ A.T) @ unit(method.anchors @ B.T).T
    torch.testing.assert_close(method.scores(x), expected, atol=1e-4, rtol=1e-4)


# --- the discriminant head --------------------------------------------------------------------------------------------


def without_some(task, kept):
    """The task with `kept[c]` of its images of class c, so that classes are of unequal size."""
    labels = np.asarray(task.train.labels)
    chosen = np.concatenate([np.flatnonzero(labels == c)[: kept[c]] for c in task.classes])
    return replace(task, train=Subset(task.train, chosen, labels[chosen]))


@pytest.mark.parametrize("form", ["images", "embeddings"])
def test_the_head_is_the_normalised_discriminant_of_features_before_the_projection(
    form, towers, small_stream, flat, stream
):
    world, tasks = (towers, small_stream) if form == "images" else (flat, stream)
    sizes = (3, 8, 5, 2, 7, 4)
    parts = [without_some(task, sizes) for task in tasks.tasks]
    method = learned(world, parts, "stat=0.6", "rerank=0")
    h, y = [], torch.cat([torch.as_tensor(task.train.labels) for task in parts])
    for task in parts:
        for pixels, _ in Loader(task.train, world.prepare, world.pixels).ordered():
            if form == "images":
                h.append(world._model.vision_model(pixel_values=pixels).pooler_output.detach())
            else:
                h.append(pixels)
    h = unit(torch.cat(h)).double()
    assert h.shape[1] == world.hidden_dim
    mu = [h[y == c].mean(0) for c in range(6)]
    S = sum(torch.outer(row - mu[c], row - mu[c]) for row, c in zip(h, y.tolist(), strict=True)) / len(h)
    n, w = len(h) / 3, world.hidden_dim
    P = w * torch.linalg.inv(n * S + S.trace() * torch.eye(w, dtype=S.dtype))
    pixels = next(iter(Loader(tasks.tests[1], world.prepare, world.pixels)))[0]
    x = world.image(pixels)
    g = unit(world._model.vision_model(pixel_values=pixels).pooler_output if form == "images" else pixels).double()
    D = torch.stack([g @ P @ m - (m @ P @ m) / 2 - np.log(6) for m in mu], 1)
    D = D / (D**2).sum(1, keepdim=True).sqrt()
    A, B = units(method)
    cosines = unit(unit(x) @ A.T) @ unit(method.anchors @ B.T).T
    found = method.scores(method.embed(pixels))
    torch.testing.assert_close(found, (world.logit_scale * (0.6 * D + 0.4 * cosines)).float(), atol=1e-3, rtol=1e-3)
    only = learned(world, parts, "stat=1")
    assert torch.equal(only.scores(only.embed(pixels)).argmax(1), D.argmax(1))


def test_the_head_alone_tells_classes_by_their_scatter():
    """Two classes whose means differ where the scatter is small: nearest means are lost in the noise, the head is not."""
    rng = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 0.1, 1.0])
    y = torch.arange(2).repeat_interleave(torch.tensor([400, 50]))
    mixing = torch.linalg.qr(torch.randn(3, 3, generator=rng))[0]
    x = (torch.randn(450, 3, generator=rng) * scales + torch.tensor([[0.6, 0.4, 0], [-0.6, -0.4, 0]])[y]) @ mixing
    mu = torch.stack([x[y == c].mean(0) for c in range(2)])
    centred = (x - mu[y]).double()
    W, b = linear_discriminant(mu, centred.T @ centred / 450, 450)
    assert ((x.double() @ W + b).argmax(1) == y).double().mean() > 0.98
    assert (torch.cdist(x, mu).argmin(1) == y).double().mean() < 0.8


def test_without_its_share_there_is_no_head_and_a_state_without_one_is_refused(flat, stream):
    none, some = learned(flat, stream.tasks[:1], "stat=0"), learned(flat, stream.tasks[:1])
    assert some.memory_bytes - none.memory_bytes == 2 * (4 * 16 + 8) + 2 * 16 * 17
    fresh = build(flat, "stat=0")
    fresh.load_state_dict(none.state_dict())
    assert torch.equal(fresh.scores(rows(stream.tests[0])), none.scores(rows(stream.tests[0])))
    with pytest.raises(ResultError, match="no discriminant head"):
        build(flat).load_state_dict(none.state_dict())


def test_a_record_from_before_the_head_is_read_as_it_was():
    """A learner's record holds every setting that there was."""
    record = {
        "descriptions": "template",
        "text_weight": 1.0,
        "image_weight": 1.0,
        "views": 1,
        "noise": 0.5,
        "replay": None,
        "candidates": 5,
        "schedule": {"epochs": 10, "batch": 64, "lr": 0.05, "optimizer": "sgd"},
    }

    def stored(name, record):
        return METHODS[name].config.model_validate(METHODS[name].completed(record))

    config = stored("engine", record)
    assert (config.stat, config.loss, config.text_weight, config.replay) == (0.0, "cross_entropy", 1.0, None)
    kept = METHODS["engine"].config(stat=0.9).model_dump(mode="json")
    assert stored("engine", kept).stat == 0.9
    first = stored("rapf", {"threshold": 0.65, "fusion": 1.0})
    assert (first.start, first.mask, first.hinge, first.unit_features, first.pair_draws) == (
        "identity",
        "ratio",
        "distance",
        True,
        None,
    )


# --- what is said -----------------------------------------------------------------------------------------------------


def test_sentences_are_those_of_the_data_set_the_templates_or_a_file(small_stream, tmp_path):
    task, log = small_stream.tasks[0], Log()
    assert sentences_of("data", task, log) == task.descriptions.of(task.names)
    filled = sentences_of("template", task, log)
    assert filled[0][0] == task.templates[0].replace("{}", task.names[0])
    assert [len(own) for own in filled] == [len(task.templates)] * 2
    path = tmp_path / "said.json"
    path.write_text(task.descriptions.model_dump_json())
    assert sentences_of(str(path), task, log) == task.descriptions.of(task.names)


def test_a_data_set_without_descriptions_is_refused(small_stream):
    with pytest.raises(DataError, match="brings none"):
        sentences_of("data", replace(small_stream.tasks[0], descriptions=None), Log())


def test_a_features_file_has_no_text_tower(flat):
    with pytest.raises(ConfigError, match="set descriptions=template"):
        build(flat, "descriptions=data")
