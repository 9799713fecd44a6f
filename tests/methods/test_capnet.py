"""CAPNET: what its parts are and do, on label sets and on one class per image."""

import math

import numpy as np
import pytest
import torch
from teaching import taught

from cairn.config import with_settings
from cairn.data.images import Dataset, LabelSets
from cairn.data.stream import task_stream
from cairn.errors import ConfigError
from cairn.maths.graph import propagated, text_graph
from cairn.maths.similarity import unit
from cairn.methods.capnet import Capnet, CapnetConfig, LabelSetBatches, corners
from cairn.towers.features import FeatureTowers
from cairn.training.context import Context
from cairn.training.seeds import Seeds

K, D = 6, 12


class Rows:
    def __init__(self, values):
        self.values, self.labels = values, np.full(len(values), -1)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]

    def describe(self, index):
        return f"row {index}"


@pytest.fixture(scope="module")
def world():
    """Rows that are sums of class directions, the texts near them; the first classes frequent, the last rare."""
    rng = np.random.default_rng(2)
    centres = np.linalg.qr(rng.normal(size=(D, D)))[0][:K] + 0.25
    texts = centres + 0.15 * rng.normal(size=centres.shape)

    def part(n, shares):
        targets = rng.random((n, K)) < shares
        targets[np.arange(K), np.arange(K)] = True
        rows = targets @ centres + 0.2 * rng.normal(size=(n, D))
        return LabelSets.of(Rows(rows.astype(np.float32)), targets)

    names = tuple(f"thing {c}" for c in range(K))
    dataset = Dataset("toy", names, part(80, np.geomspace(0.6, 0.05, K)), part(60, 0.3), ("a {}.",))
    towers = FeatureTowers(
        name="toy", dim=D, logit_scale=20.0, fingerprint="toy", names=names, text=texts.astype(np.float32)
    )
    return task_stream(dataset, step=3), towers


def method(towers, *changes, seed=1):
    config = with_settings(CapnetConfig.embedding(), dict(change.split("=") for change in changes))
    return Capnet(towers, config, seed=seed)


def test_before_any_step_scores_are_cosines_of_texts_less_a_bias(world):
    stream, towers = world
    learned = taught(method(towers, "schedule.epochs=0"), stream.tasks)
    z = unit(torch.from_numpy(stream.tests[0].source.values))
    T = towers.class_texts(stream.class_names, ("a {}.",))
    first = stream.tasks[0].label_sets
    rows = unit(torch.from_numpy(first.source.values[first.indices]))
    torch.testing.assert_close(learned.scores(z), (z @ T.T - (rows @ T[:3].T).mean()) / 0.05, atol=1e-4, rtol=1e-4)


def test_class_vectors_are_the_written_formula(world):
    stream, towers = world
    learned = taught(method(towers, "schedule.epochs=3", "graph.lr=0.05"), stream.tasks)
    A = text_graph(towers.class_texts(stream.class_names, ("a {}.",)), 0.2, 8)
    p = learned.texts().detach()
    expected = unit(p + propagated(A, p, [layer.detach() for layer in learned.layers]))
    torch.testing.assert_close(learned.vectors, expected)
    assert float((learned.vectors - p).abs().max()) > 1e-3
    z = torch.randn(4, D)
    tau, b = math.exp(learned.log_tau.item()), learned.bias.item()
    torch.testing.assert_close(learned.scores(z), (unit(z) @ expected.T - b) / tau, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change", ["graph.share=0.6", "graph.neighbours=1", "graph.layers=1", "graph.widening=1", "text.freeze_old=false"]
)
def test_where_the_graph_moves_its_settings_count(world, change):
    stream, towers = world
    z = torch.from_numpy(stream.tests[0].source.values)
    plain, other = (
        taught(method(towers, "schedule.epochs=3", "graph.lr=0.05", *some), stream.tasks) for some in ((), (change,))
    )
    assert not torch.allclose(plain.scores(z), other.scores(z), atol=1e-3)


def test_classes_of_which_nothing_is_told_keep_their_answers(world):
    stream, towers = world
    z = torch.from_numpy(stream.tests[0].source.values)

    def moved(*changes):
        learned = taught(method(towers, "schedule.epochs=8", "graph.lr=0.02", *changes), stream.tasks[:1])
        before = learned.scores(z).sigmoid()
        learned.learn(stream.tasks[1], Context(Seeds(1)))
        return float((learned.scores(z)[:, :3].sigmoid() - before).abs().mean())

    assert moved("distillation=5") < 0.6 * moved("distillation=0")


def test_a_class_that_comes_back_is_learned_on(world):
    stream, towers = world
    learned = taught(method(towers), stream.tasks)
    sets = stream.tasks[0].label_sets
    again = LabelSets.of(sets.source, np.pad(sets.targets, ((0, 0), (0, 3))), sets.indices)
    again_task = type(stream.tasks[0])(2, range(6, 6), (), ("a {}.",), again.copies(), None, again)
    before = learned.scores(torch.from_numpy(again.source.values))
    learned.learn(again_task, Context(Seeds(1)))
    assert learned.scores(torch.from_numpy(again.source.values)).shape == before.shape


def test_images_of_one_class_are_learned_as_sets_of_one(world):
    stream, towers = world
    sets = stream.tasks[0].label_sets
    own = sets.targets.sum(1) == 1
    single = LabelSets.of(sets.source, sets.targets[own], sets.indices[own])
    task = stream.tasks[0]
    plain = type(task)(0, task.classes, task.names, task.templates, single.copies(), None)
    as_sets = type(task)(0, task.classes, task.names, task.templates, single.copies(), None, single)
    z = torch.from_numpy(sets.source.values)
    one, other = (
        taught(method(towers, "sampling=plain", "schedule.epochs=1", "schedule.batch=200"), [t])
        for t in (plain, as_sets)
    )
    torch.testing.assert_close(one.scores(z), other.scores(z), atol=1e-4, rtol=1e-4)  # rows come in another order


def test_class_by_class_every_class_is_drawn_as_often():
    shares = torch.tensor([0.9, 0.3, 0.05])
    rng = torch.Generator().manual_seed(0)
    Y = torch.rand(400, 3, generator=rng) < shares
    batches = LabelSetBatches(torch.zeros(400, 2), Y, 32, class_aware=True)
    drawn = torch.cat([batches.order(torch.Generator().manual_seed(seed)) for seed in range(40)])
    assert len(batches) == 13
    alone = Y.sum(1) == 1
    rare = (Y[:, 2] & ~alone) | (Y[:, 2] & alone)
    assert (rare[drawn].float().mean() - 1 / 3).abs() < 0.08  # a third for its own sake; by chance 5 %
    plain = LabelSetBatches(torch.zeros(400, 2), Y, 32, class_aware=False)
    assert sorted(plain.order(rng).tolist()) == list(range(400))


def test_batches_of_an_epoch_go_on_where_they_were_left():
    Y = torch.rand(50, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    batches = LabelSetBatches(torch.arange(50.0)[:, None], Y, 8, class_aware=True)
    whole = [z for z, _ in next(batches.epochs([torch.Generator().manual_seed(3)]))]
    rest = [z for z, _ in next(batches.epochs([torch.Generator().manual_seed(3)], skip=4))]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_corners_are_cut_from_the_corners():
    image = torch.zeros(1, 3, 16, 16)
    image[..., :2, :2] = 1
    found = corners(image)
    assert [view.shape for view in found] == [image.shape] * 4
    assert [float(view[0, 0, 0, 0]) > 0.5 for view in found] == [True, False, False, False]


def test_views_are_averaged(towers):
    learned = Capnet(towers, CapnetConfig(ensemble=True), seed=1)
    d = towers.dim
    learned.vectors = unit(torch.randn(3, d, generator=torch.Generator().manual_seed(0)))
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = learned.embed(pixels)
        torch.testing.assert_close(features[:, :d], towers.image(pixels))
        views = [towers.image(view) for view in (pixels, *corners(pixels))]
        alone = Capnet(towers, CapnetConfig(), seed=1)
        alone.vectors = learned.vectors
        expected = torch.stack([alone.scores(view) for view in views]).mean(0)
    torch.testing.assert_close(learned.scores(features), expected)
    assert CapnetConfig(ensemble=True).alters_images
    assert not CapnetConfig().alters_images


def test_a_features_file_has_no_corners(world):
    with pytest.raises(ConfigError, match="ensemble true: a features file has no images"):
        method(world[1], "ensemble=true")
