"""MCCL: its losses and disturbances against naive twins, and what unlabelled images change."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from teaching import rows, taught

from cairn.config import with_settings
from cairn.data.augment import STRONG_CHANCES, strong_view
from cairn.data.images import Unlabelled
from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.maths import consistency
from cairn.maths.similarity import unit
from cairn.methods import mccl
from cairn.methods.catalogue import METHODS
from cairn.methods.mccl import Inputs
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds


def build(towers, *assignments):
    entry = METHODS["mccl"]
    quick = ("schedule.epochs=3", "schedule.batch=16")
    return entry.build(towers, with_settings(entry.default_config(towers), [*quick, *assignments]), seed=1)


def features(n=9, d=6, seed=0):
    """Unit rows of a weak and of a strong view: correlated, of unequal spread, some far from one another."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    w = torch.randn(n, d, generator=rng, dtype=torch.float64) @ mixing
    return unit(w), unit(w + 0.4 * torch.randn(n, d, generator=rng, dtype=torch.float64)), rng


# --- losses -----------------------------------------------------------------------------------------------------------


def test_pseudo_labels_are_the_likeliest_classes_and_trusted_from_the_threshold_on():
    logits = torch.tensor([[0.0, math.log(4.0)], [math.log(9.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
    found, trusted = consistency.pseudo_labels(logits, 0.85)
    assert found.tolist() == [1, 0, 0]
    assert trusted.tolist() == [False, True, False]
    assert consistency.pseudo_labels(logits, 0.8 - 1e-12)[1].tolist() == [True, True, False]


def test_trusted_cross_entropy_divides_by_all_rows():
    rng = np.random.default_rng(0)
    logits, pseudo, trusted = rng.normal(size=(7, 4)), rng.integers(4, size=7), rng.random(7) < 0.5
    total = 0.0
    for row, c, sure in zip(logits, pseudo, trusted, strict=True):
        total -= sure * (row[c] - math.log(sum(math.exp(v) for v in row)))
    found = consistency.trusted_cross_entropy(*(torch.as_tensor(part) for part in (logits, pseudo, trusted)))
    assert found.item() == pytest.approx(total / 7)


def test_equal_views_are_aligned_and_others_by_their_angle():
    w, s, _ = features()
    assert consistency.point_to_point(w, w).item() == pytest.approx(0)
    angles = [math.acos(min(1.0, float(a @ b))) for a, b in zip(w, s, strict=True)]
    assert consistency.point_to_point(w, s).item() == pytest.approx(1 - sum(map(math.cos, angles)) / len(w))


def naive_compactness(w, s, pseudo, trusted, prototypes, near, far):
    found = []
    for c in sorted({int(p) for p, sure in zip(pseudo, trusted, strict=True) if sure}):
        i = sorted((i for i in range(len(w)) if pseudo[i] == c and trusted[i]), key=lambda i: -w[i] @ prototypes[c])[
            :near
        ]
        j = sorted((j for j in range(len(w)) if pseudo[j] == c), key=lambda j: s[j] @ prototypes[c])[:far]
        found.append(np.mean([max(w[a] @ s[b] for a in i) for b in j]))
    return 1 - np.mean(found)


@pytest.mark.parametrize(("near", "far"), [(16, 256), (2, 3), (1, 1)])
def test_compactness_is_the_written_one(near, far):
    w, s, rng = features(30)
    pseudo = torch.randint(4, (30,), generator=rng)
    trusted = (torch.rand(30, generator=rng) < 0.6) & (pseudo != 2)  # class 2 has none to be trusted
    prototypes = unit(torch.randn(4, 6, generator=rng, dtype=torch.float64))
    found = consistency.compactness(w, s, pseudo, trusted, prototypes, near, far)
    wanted = naive_compactness(w.numpy(), s.numpy(), pseudo, trusted, prototypes.numpy(), near, far)
    assert found.item() == pytest.approx(wanted)
    assert consistency.compactness(w, s, pseudo, torch.zeros(30, dtype=torch.bool), prototypes, near, far) == 0


# --- disturbances -----------------------------------------------------------------------------------------------------


def test_the_more_alike_two_views_are_the_more_they_are_disturbed():
    w, s, _ = features()
    own = torch.arange(9)
    rho = consistency.strength(w, s, own)
    cosines = (w * s).sum(1)
    assert (rho.argsort() == cosines.argsort()).all()
    torch.testing.assert_close(rho, 3 * (cosines + 1) / 20)
    torch.testing.assert_close(consistency.strength(w, w, own), torch.full((9,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(consistency.strength(w, -w, own), torch.zeros(9, dtype=torch.float64))


def test_the_rows_of_an_image_are_disturbed_alike():
    w, s, _ = features()
    images = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    rho, cosines = consistency.strength(w, s, images), (w * s).sum(1)
    for image in range(3):
        assert rho[images == image].tolist() == pytest.approx(
            [3 * (cosines[images == image].mean().item() + 1) / 20] * (images == image).sum()
        )


def test_noise_is_within_its_strength_and_none_is_the_identity():
    e, _, rng = features(400)
    draws = torch.rand(400, 6, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(consistency.with_noise(e, torch.zeros(400, dtype=torch.float64), draws), e)
    rho = torch.full((400,), 0.3, dtype=torch.float64)
    shares = consistency.with_noise(e, rho, draws) / e
    shares = shares / shares[:, :1]  # the length is taken off
    assert 0.7 / 1.3 <= shares.min() < 0.6
    assert 1.7 < shares.max() <= 1.3 / 0.7


def test_what_is_most_active_is_left_out():
    e = unit(torch.tensor([[0.5, -2.0, 1.0, 1.9], [1.0, 0.1, 0.1, 0.1]], dtype=torch.float64))
    half, rho = torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([0.3, 0.0], dtype=torch.float64)
    found = consistency.masked(e, e.abs(), rho, half)  # from .7 and from all of the largest on
    assert (found == 0).tolist() == [[False, True, False, True], [True, False, False, False]]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, dtype=torch.float64))
    v = [0.7 - 0.1, 0.7 + 0.1]
    for draw, least in zip((0.0, 1.0), v, strict=True):
        line = torch.tensor([[1.0, least + 1e-6, least - 1e-6]], dtype=torch.float64)
        kept = consistency.masked(line, line, rho[:1], torch.tensor([draw], dtype=torch.float64))
        assert (kept[0] == 0).tolist() == [True, True, False]


def test_dropout_takes_its_share_of_entries():
    e, _, rng = features(500)
    draws = torch.rand(500, 6, generator=rng, dtype=torch.float64)
    found = consistency.dropped(e, 0.25, draws)
    assert ((found == 0) == (draws < 0.25)).all()
    torch.testing.assert_close(consistency.dropped(e, 0.0, draws), e)


def test_the_ramp_rises_to_one():
    values = [consistency.ramp(t / 10) for t in range(11)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(math.exp(-10))
    assert values[-1] == 1


def test_a_strong_view_moves_nothing(towers):
    """A bright point stays where it is, whatever light, colour or blur; without any chance the image stays as it is."""
    pixels = torch.zeros(64, 3, 20, 20)
    pixels[:, :, 13, 4] = 5.0
    chances = torch.rand(64, STRONG_CHANCES, generator=torch.Generator().manual_seed(0))
    seen = strong_view(pixels, chances).sum(1)
    seen = (seen - seen[:, :1, :1]).abs().flatten(1).argmax(1)
    assert (seen == 13 * 20 + 4).all()
    torch.testing.assert_close(strong_view(pixels, torch.ones(64, STRONG_CHANCES)), pixels)
    middle = torch.full((64, STRONG_CHANCES), 0.5)
    middle[:, 8] = 0.0  # light and colour by nothing
    middle[:, 9:] = 1.0
    torch.testing.assert_close(strong_view(pixels, middle), pixels)
    grey = middle.clone()
    grey[:, 9] = 0.0
    coloured = pixels * torch.tensor([1.0, 0.5, 0.1])[:, None, None]
    assert strong_view(coloured, grey).std(1).max() < 1e-6


# --- the whole of the loss --------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_parts(flat):
    """Written out, with the encoder and the class vectors away from where they start; of all classes those of the task alone."""
    d, k, u, t = flat.dim, 5, 12, 0.7
    method = build(flat, "threshold=0.3", "alignment=0.2", "compactness=0.03", "intervention=0.5", "consistency=1.5")
    rng = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=rng)

    E = 0.1 * some(d, d)
    method.projector.current.data.copy_(E)
    H, among = unit(some(k, d)), torch.tensor([1, 2, 4])
    w, s1, s2 = unit(some(u, d)), unit(some(u, d)), unit(some(u, d))
    draws = torch.rand(u, 2 * d + 1, generator=rng)
    found = method._of_unlabelled(Inputs(some(1, d), w, s1, s2, draws, t), H, among)

    ew, e1, e2 = (unit(x + x @ E.T) for x in (w, s1, s2))
    drops, noise, mask = draws[:, :d], draws[:, d : 2 * d], draws[:, -1]
    T, s = H[among], flat.logit_scale
    q, own = (s * ew @ T.T).softmax(1), torch.arange(u)
    pseudo, trusted = q.argmax(1), q.amax(1) >= 0.3
    assert 0 < trusted.sum() <= u

    def cross(e):
        return torch.stack([-((s * e[i] @ T.T).log_softmax(0)[pseudo[i]]) * trusted[i] for i in range(u)]).sum() / u

    L_s1, L_s2, L_fp = cross(e1), cross(e2), cross(unit(ew * (drops >= 0.5)))
    p2p = 1 - torch.cat([(ew * e1).sum(1), (ew * e2).sum(1)]).mean()
    dt = consistency.compactness(ew, e1, pseudo, trusted, T, 16, 256)
    rho = consistency.strength(ew, e1, own)
    L_n = ((s * consistency.with_noise(e1, rho, noise) @ T.T).softmax(1) - q).square().mean()
    L_m = ((s * consistency.masked(e1, e1.abs(), rho, mask) @ T.T).softmax(1) - q).square().mean()
    wanted = (
        1.5 * (L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2 + 0.2 * p2p + 0.03 * dt + 0.5 * consistency.ramp(t) * (L_n + L_m)
    )
    torch.testing.assert_close(found, wanted)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(embedded_dataset):
    return task_stream(embedded_dataset, step=3, labelled=0.1)


def test_without_unlabelled_images_it_learns_from_labelled_ones_in_as_many_steps(flat, few):
    steps = []

    def learned(task, *settings):
        events = []
        method = build(flat, *settings)
        method.learn(task, Context(Seeds(1), Log(keep=events.append)))
        steps.append(len([e for e in events if e["event"] == "epoch"]))
        return method.state_dict()

    task = few.tasks[0]
    off, without = learned(task, "unlabelled=false"), learned(replace(task, unlabelled=None))
    assert off["memory.counts"].tolist() == without["memory.counts"].tolist() == np.bincount(task.train.labels).tolist()
    x, y = torch.ones(9, 4), torch.zeros(9, dtype=torch.int64)
    method = build(flat)
    batches = mccl._Batches(x, y, torch.zeros(0, 3, 4), 100, method.memory, method.config, x.device)
    (epoch,) = batches.epochs([torch.Generator()])
    assert [(len(inputs.x), len(inputs.w)) for inputs, _ in epoch] == [(16, 0)] * 4  # 100 in steps of 2 x 16
    assert steps == [3, 3]


def test_trusted_images_join_the_statistics_of_the_class_they_are_taken_for(flat, few):
    events = []
    method = build(flat, "threshold=0.6")
    method.learn(few.tasks[0], Context(Seeds(1), Log(keep=events.append)))
    (told,) = [event for event in events if event["event"] == "unlabelled"]
    labelled = np.bincount(few.tasks[0].train.labels)
    assert 0 < told["trusted"] <= told["images"] == len(few.tasks[0].unlabelled)
    assert int(method.memory.counts.sum()) == labelled.sum() + told["trusted"]
    alone = taught(build(flat, "threshold=0.6", "statistics=labelled"), few.tasks[:1])
    assert alone.memory.counts.tolist() == labelled.tolist()
    torch.testing.assert_close(alone.residuals, method.residuals)


def test_an_old_class_gets_nothing_from_unlabelled_images_of_a_later_task(flat, few):
    first = taught(build(flat, "threshold=0.4"), few.tasks[:1])
    both = taught(build(flat, "threshold=0.4", "among=seen"), few.tasks)
    assert both.memory.counts[:3].tolist() == first.memory.counts.tolist()


def test_unlabelled_images_teach(flat, few):
    """With two to five labels of a class, the others tell where it lies."""
    test = torch.cat([rows(images) for images in few.tests])
    y = torch.cat([torch.as_tensor(images.labels) for images in few.tests])

    def right(*settings):
        return (taught(build(flat, "schedule.epochs=10", *settings), few.tasks).scores(test).argmax(1) == y).sum()

    assert right() >= right("unlabelled=false")


def test_embeddings_have_noise_for_a_strong_view(flat, few):
    hidden = rows(few.tasks[0].unlabelled)
    for noise in (0.1, 0.5):
        views = build(flat, f"noise={noise}")._views(few.tasks[0], Context(Seeds(1)))
        torch.testing.assert_close(views[:, 0], unit(hidden))
        tangents = (1 / (views[:, 1:] * views[:, :1]).sum(2) ** 2 - 1).mean().sqrt()  # across the row, of its length
        assert tangents == pytest.approx(noise, rel=0.15)


def test_pictures_in_their_views(towers, small_stream):
    task = small_stream.tasks[0]
    few_labels = replace(task, unlabelled=Unlabelled(task.train, np.arange(0, len(task.train), 2)))
    method, hidden = build(towers, "views=3"), few_labels.unlabelled
    views = method._views(few_labels, Context(Seeds(1)))
    assert views.shape == (len(hidden), 4, towers.dim)
    pixels = torch.cat([pixels for pixels, _ in Loader(hidden, towers.prepare, towers.pixels).ordered()])
    torch.testing.assert_close(views[:, 0], unit(towers.image(pixels)), atol=1e-5, rtol=1e-4)
    assert 0.5 < (views[:, 1:] * views[:, :1]).sum(2).mean() < 0.99
    assert not torch.equal(views[:, 1], views[:, 2])
    taught(method, [few_labels])
    assert method.memory.counts.sum() >= len(task.train)
