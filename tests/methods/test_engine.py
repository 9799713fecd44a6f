"""ENGINE: its losses, its noise, its re-ranking and its altered images, each against the formula in loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.data.views import LIGHT, SMALLEST, view
from cairn.errors import ConfigError, DataError
from cairn.maths.similarity import unit
from cairn.methods import engine
from cairn.methods.catalogue import METHODS
from cairn.methods.described import sentences_of
from cairn.methods.settings import with_settings
from cairn.towers.features import FeatureTowers
from cairn.training.log import Log

FAST = ("schedule.epochs=1", "schedule.batch=16")


@pytest.fixture
def flat(embedded_dataset):
    held = embedded_dataset.embeddings
    return FeatureTowers(
        name="made", dim=held.dim, logit_scale=held.logit_scale, fingerprint="made",
        names=embedded_dataset.classes, text=held.text,
    )  # fmt: skip


@pytest.fixture
def stream(embedded_dataset):
    return task_stream(embedded_dataset, step=2)


def build(towers, *assignments):
    entry = METHODS["engine"]
    config = with_settings(entry.default_config(towers), [*FAST, *assignments])
    return entry.build(towers, config, seed=1, log=Log())


def learned(towers, tasks, *assignments):
    method = build(towers, *assignments)
    for task in tasks:
        method.learn(task)
    return method


def rows(images):
    return torch.stack([torch.as_tensor(images[i]) for i in range(len(images))])


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


@pytest.mark.parametrize("form", ["images", "embeddings"])
def test_the_loss_is_the_sum_of_its_three_parts(form, towers, small_stream, flat, stream, monkeypatch):
    seen = {}

    def spy(loss, parameters, batches, *_):
        rng = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=rng)
        x, y = next(next(batches.epochs([rng])))
        seen.update(x=x, y=y, value=loss(x, y).item())

    world, tasks = (towers, small_stream.tasks) if form == "images" else (flat, stream.tasks)
    method = learned(world, tasks[:1], "views=2", "text_weight=0.5", "image_weight=2")
    monkeypatch.setattr(engine, "fit", spy)
    method.learn(tasks[1])
    (A, B), s, d = units(method), world.logit_scale, world.dim
    said = [sum(unit(own)) for own in method.sentences]
    total = 0.0
    for x, y in zip(seen["x"], seen["y"].tolist(), strict=True):
        image, first, second = x.split(d)
        cosines = torch.stack([cosine_similarity(A @ image, B @ t, dim=0) for t in method.anchors])
        L_c = -(s * cosines).log_softmax(0)[y]
        L_t = -cosine_similarity(B @ method.anchors[y], said[y], dim=0)
        L_i = -sum(cosine_similarity(A @ image, other, dim=0) for other in (first, second)) / 2
        total += (L_c + 0.5 * L_t + 2 * L_i).item()
    assert seen["value"] == pytest.approx(total / len(seen["x"]), rel=1e-4)
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
    method.learn(stream.tasks[1])
    for side, before in zip(("visual", "textual"), finished, strict=True):
        torch.testing.assert_close(torch.eye(16) + method.units[side].finished, before, atol=0, rtol=0)
        assert method.units[side].current.abs().max() > 0
    x = unit(rows(stream.tasks[1].train))
    torch.testing.assert_close(method.means.means[2:], torch.stack([x[:30].mean(0), x[30:].mean(0)]))


def test_text_weight_brings_class_texts_to_their_descriptions(towers, small_stream):
    nearness = []
    for weight in (0, 5):
        method = learned(towers, small_stream.tasks[:1], f"text_weight={weight}", "schedule.epochs=10")
        T = method.units["textual"](method.anchors)
        nearness.append((T * method._described()).sum(1).mean().item())
    assert nearness[1] > nearness[0] + 0.01


def test_image_weight_brings_images_to_altered_ones(flat, stream):
    nearness = []
    for weight in (0, 20):
        method = learned(flat, stream.tasks[:1], f"image_weight={weight}", "schedule.epochs=10")
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
def test_scores_are_the_injected_probability_plus_the_mean_over_pairs(towers, small_stream, candidates):
    method = learned(towers, small_stream.tasks, f"candidates={candidates}")
    pixels = next(iter(Loader(small_stream.tests[1], towers.prepare, towers.pixels)))[0]
    x, (A, B), s = unit(towers.image(pixels)), units(method), towers.logit_scale
    injected = (s * unit(x @ A.T) @ unit(method.anchors @ B.T).T).softmax(1)
    said = torch.cat(method.sentences)
    tells = engine.telling(method.sentences, unit(torch.stack([own.mean(0) for own in method.sentences])))
    f = injected.clone()
    for i in range(len(x)):
        best = injected[i].argsort(descending=True)[: min(candidates, 6)].tolist()
        for a in best:
            for b in set(best) - {a}:
                pair = s * torch.stack([x[i] @ said[tells[a, b]], x[i] @ said[tells[b, a]]])
                f[i, a] += pair.softmax(0)[0] / (len(best) - 1)
    found = method.scores(method.embed(pixels))
    torch.testing.assert_close(found.softmax(1), f / f.sum(1, keepdim=True), atol=1e-4, rtol=1e-3)
    assert (f.argmax(1) == found.argmax(1)).all()
    assert (f - injected).max() > 0.2


def test_one_candidate_is_no_re_ranking(flat, stream):
    method = learned(flat, stream.tasks, "candidates=1")
    x, (A, B) = unit(rows(stream.tests[0])), units(method)
    expected = flat.logit_scale * unit(x @ A.T) @ unit(method.anchors @ B.T).T
    torch.testing.assert_close(method.scores(x), expected, atol=1e-4, rtol=1e-4)


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
