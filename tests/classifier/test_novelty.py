"""The known score: that images and references are scored alike, and how references are weighed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn import IncrementalClassifier
from cairn.classifier.calibration import folds, near_duplicates
from cairn.classifier.novelty import Novelty, _Relative
from cairn.data.images import Subset
from cairn.data.opening import open_dataset
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import task_stream
from cairn.experiment.inputs import towers_for
from cairn.experiment.schema import RunConfig
from cairn.maths.shrinkage import Oas
from cairn.memory.covariances import Shared
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import GaussianScoring
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.seeds import Seeds


class Means(GaussianScoring):
    """Class means on the sphere."""

    def __init__(self, z, y):
        self.memory = GaussianMemory(z.shape[1], covariance=Shared()).add(z, y)

    def row_scores(self, z):
        return 20 * z @ self.memory.means.to(z).T


def clusters(per_class=(40, 9, 25), d=6):
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(len(per_class)).repeat_interleave(torch.tensor(per_class))
    mixing = torch.randn(d, d, generator=rng) * 0.2
    z = torch.randn(len(per_class), d, generator=rng)[y] + torch.randn(len(y), d, generator=rng) @ mixing.T
    return z / z.norm(dim=1, keepdim=True), y


def test_the_score_of_an_image_counts_as_that_of_a_reference_does():
    """What a method makes of an image beyond its row (SPA's own plan) is not known of references, so it must not count."""
    z, y = clusters()
    method = Means(z, y)
    novelty = Novelty(method, 1, Novelty(method, 1).fit(z).tolist())
    plain = novelty.known(z, method.scores(z))
    np.testing.assert_array_equal(novelty.known(z, method.scores(z) + 30), plain)


@pytest.mark.parametrize("score", ["plan", "feature"])
def test_half_of_the_known_images_fall_below_a_half(towers, score):
    data = shapes_dataset()
    settings = {"schedule.epochs": 1, "local.score": score}
    learner = IncrementalClassifier("spa", towers, settings=settings)

    def some(images, per_class):
        rows = [i for c in range(4) for i in np.flatnonzero(images.labels == c)[:per_class]]
        return [images[i] for i in rows], [data.classes[images.labels[i]] for i in rows]

    learner.partial_fit(*some(data.train, 30))
    known = learner.known_score(some(data.test, 20)[0])
    assert 0.3 < (known < 0.5).mean() < 0.7


def test_references_are_as_far_from_their_class_as_new_images_are():
    """Of five images a class mean has a fifth of each: one that is not left out of its mean lies a third nearer, squared."""
    k, per_class, new, d = 100, 5, 10, 24
    rng = torch.Generator().manual_seed(0)
    means, mixing = torch.randn(k, d, generator=rng), 0.1 * torch.randn(d, d, generator=rng)

    def drawn(number):
        y = torch.arange(k).repeat_interleave(number)
        z = means[y] + torch.randn(len(y), d, generator=rng) @ mixing.T
        return list((z / z.norm(dim=1, keepdim=True)).numpy()), [f"class {c}" for c in y.tolist()]

    texts = (means / means.norm(dim=1, keepdim=True)).numpy()
    names = tuple(f"class {c}" for c in range(k))
    towers = FeatureTowers(name="drawn", dim=d, logit_scale=20.0, fingerprint="drawn", names=names, text=texts)
    known = IncrementalClassifier("lda", towers, seed=1).partial_fit(*drawn(per_class)).known_score(drawn(new)[0])
    assert 0.44 < known.mean() < 0.56  # p-values: even between 0 and 1
    assert 0.03 < (known < 0.1).mean() < 0.17


def test_references_are_of_a_method_that_did_not_learn_the_images(features):
    """Whatever of the score depends on what was learned: statistics, class scores and their scales."""
    dataset = open_dataset(features)
    towers = towers_for(RunConfig(method="lda", data=features), dataset)
    learner, expected, among, entry = IncrementalClassifier("lda", towers, seed=5), [], [], METHODS["lda"]
    alone = entry.build(towers, entry.default_config(towers), seed=5)
    for task in task_stream(dataset, step=3).tasks:
        images = [task.train[i] for i in range(len(task.train))]
        before, z = alone.state_dict(), torch.from_numpy(np.stack(images))
        chosen = folds(z, task.train.labels, Seeds(5).at(task=task.index).generator("folds"))
        assert set(chosen) == set(range(5))  # every image is left out once
        for fold in range(5):
            kept, out = np.flatnonzero(chosen != fold), np.flatnonzero(chosen == fold)
            alone.load_state_dict(before)
            alone.learn(replace(task, train=Subset(task.train, kept, task.train.labels[kept])), Context(Seeds(5)))
            expected += Novelty(alone, 5).fit(alone.memory_rows(z[out])).tolist()
        among += [task.classes.stop] * len(images)
        learner.partial_fit(images, [task.names[c - task.classes.start] for c in task.train.labels])
        alone.load_state_dict(learner.method_.state_dict())
    np.testing.assert_allclose(learner.references_, expected, rtol=1e-6)
    assert learner.referenced_among_ == among


def filmed(videos, frames, d, rng, spread=0.6):
    """Rows of one class: `frames` of each video, much closer to one another than to those of other videos."""
    scenes = torch.randn(d, generator=rng) + spread * torch.randn(videos, d, generator=rng)
    return (scenes[:, None] + 0.15 * torch.randn(videos, frames, d, generator=rng)).flatten(0, 1)


def test_near_duplicates_are_one_group():
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(12, generator=rng)
    video = torch.arange(4).repeat_interleave(3)[order].tolist()
    group = near_duplicates(filmed(4, 3, 24, rng)[order]).tolist()
    assert group == [video.index(v) for v in video]
    assert near_duplicates(torch.randn(9, 24, generator=rng)).tolist() == list(range(9))
    angles = torch.deg2rad(torch.tensor([0.0, 5.0, 10.0, 15.0, 80.0]))  # a chain: neighbours alone are close
    chain = torch.stack([angles.cos(), angles.sin()], 1)
    assert near_duplicates(chain).tolist() == [0, 0, 0, 0, 4]
    assert near_duplicates(chain[:1]).tolist() == [0]


def test_a_group_is_in_one_fold_and_folds_are_about_even():
    rng = torch.Generator().manual_seed(1)
    z = torch.cat([filmed(10, 3, 24, rng), torch.randn(7, 24, generator=rng), torch.ones(2, 24)])
    labels = np.repeat([0, 1, 2], [30, 7, 2])
    chosen = folds(z, labels, torch.Generator().manual_seed(2))
    assert all(len(set(chosen[first : first + 3])) == 1 for first in range(0, 30, 3))
    assert np.bincount(chosen[:30]).tolist() == [6] * 5
    assert sorted(np.bincount(chosen[30:37])) == [1, 1, 1, 2, 2]
    assert chosen[37:].tolist() == [-1, -1]  # nothing would be left of the class


def test_a_threshold_keeps_its_promise_where_images_are_frames_of_videos():
    """New images are of other videos, as UCF-101's test frames are."""
    k, d, rng = 40, 32, torch.Generator().manual_seed(0)
    rows = [filmed(12, 4, d, rng) for _ in range(k)]
    learned, new = [x[:24] for x in rows], [x[24:] for x in rows]
    names = [f"c{c}" for c in range(k)]
    texts = torch.stack([x.mean(0) for x in rows])
    towers = FeatureTowers(name="films", dim=d, logit_scale=20.0, fingerprint="films", names=names,
                           text=(texts / texts.norm(dim=1, keepdim=True)).numpy())  # fmt: skip
    learner = IncrementalClassifier("lda", towers)
    for first in range(0, k, 8):
        some = range(first, first + 8)
        learner.partial_fit(
            list(torch.cat([learned[c] for c in some]).numpy()), np.repeat([names[c] for c in some], 24)
        )
    lost = (learner.known_score(list(torch.cat(new).numpy())) < 0.05).mean()
    assert 0.03 <= lost <= 0.07


def test_a_threshold_loses_what_it_says_when_many_classes_were_added():
    """Ten tasks of five classes with few images for the width: after the first, covariances are made almost round, after
    the last they are not. New images are drawn as the learned ones were."""
    k, per_class, new, d = 50, 12, 40, 48
    rng = torch.Generator().manual_seed(0)
    means = torch.randn(k, d, generator=rng)
    mixing = torch.randn(d, d, generator=rng) * 0.1

    def drawn(number):
        y = torch.arange(k).repeat_interleave(number)
        z = means[y] + torch.randn(len(y), d, generator=rng) @ mixing.T
        return (z / z.norm(dim=1, keepdim=True)).numpy(), y.numpy()

    (z, y), (test, _) = drawn(per_class), drawn(new)
    names = [f"c{c}" for c in range(k)]
    texts = (means / means.norm(dim=1, keepdim=True)).numpy()
    towers = FeatureTowers(name="drawn", dim=d, logit_scale=20.0, fingerprint="drawn", names=names, text=texts)
    learner = IncrementalClassifier("lda", towers)
    for first in range(0, k, 5):
        rows = np.flatnonzero((y >= first) & (y < first + 5))
        learner.partial_fit(list(z[rows]), [names[c] for c in y[rows]])
    assert 0.03 <= (learner.known_score(list(test)) < 0.05).mean() <= 0.07


def test_few_pictures_are_left_out_in_turn(towers):
    """Four of each of three classes: a fifth of them would be three references, below which every fourth new picture lies."""
    world = shapes_dataset()
    rows = [np.flatnonzero(world.train.labels == c) for c in range(3)]

    def some(part):
        return [world.train[i] for own in rows for i in own[part]], [
            world.classes[c] for c in range(3) for _ in rows[c][part]
        ]

    new, _ = some(slice(100, 120))
    for method in ("blend", "lda"):
        learner = IncrementalClassifier(method, towers).partial_fit(*some(slice(4)))
        assert len(learner.references_) == 12
        assert (learner.known_score(new) < 0.05).mean() <= 0.1
    learner = IncrementalClassifier("blend", towers).partial_fit(*some(slice(1)))
    assert learner.references_ == []


def test_references_weigh_by_the_classes_that_were_known():
    z, y = clusters()
    method = Means(z, y)
    row, scores = z[:1], method.scores(z[:1])
    a = Novelty(method, 1).fit(row).item()
    references, among = [a - 1, a - 0.5, a + 1, a + 2], [1, 2, 2, 3]
    assert Novelty(method, 1, references, among).known(row, scores)[0] == pytest.approx(17 / 114)
    assert Novelty(method, 1, references).known(row, scores)[0] == pytest.approx(2 / 4)


def test_scatter_of_few_images_is_rounder():
    z, y = clusters()
    means = torch.stack([z[y == c].double().mean(0) for c in range(3)])
    T = sum(n * np.cov(z[y == c].double().numpy(), rowvar=False, bias=True) for c, n in enumerate((40, 9, 25)))
    for N in (3, 71, 700):
        counts = torch.tensor([N - 1, 2, 2])
        V = Oas()(torch.from_numpy(T) / N, torch.tensor(N)).numpy()
        r = 1 / (1 + (N / 6) ** 2)
        W = (1 - r) * V + r * np.trace(V) / 6 * np.eye(6)
        factor = _Relative(torch.from_numpy(T), means, counts).factor
        np.testing.assert_allclose((factor @ factor.T).numpy(), W, rtol=1e-8)


@pytest.mark.parametrize("counts", [(1,), (1, 1), (2, 2), (1, 2), (2, 2, 2)])
@pytest.mark.parametrize("method", ["blend", "lda"])
def test_one_or_two_pictures_of_a_class_are_enough(towers, method, counts):
    """Of two a rehearsal leaves out one, and of the others nothing tells how a class scatters: blend ended with an error."""
    rng = np.random.default_rng(0)
    labels = [f"class {c}" for c, n in enumerate(counts) for _ in range(n)]
    pictures = [rng.integers(0, 255, (56, 56, 3), dtype=np.uint8) for _ in labels]
    learner = IncrementalClassifier(method, towers).partial_fit(pictures, labels)
    known = learner.known_score(pictures)
    assert np.isfinite(known).all()
    another = rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)
    learner.partial_fit([another], ["one more"])  # what draws of the first classes say has been asked by now
    assert learner.predict([pictures[0]])[0] == "class 0"
