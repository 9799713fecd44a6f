"""Segment: sums, discriminant and shares against naive twins; masks; images without labels; mIoU of a run."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from teaching import taught

from cairn.config import with_settings
from cairn.data.feature_store import FeatureStore
from cairn.data.images import Concatenation, Subset, Unlabelled, mask_of
from cairn.data.loading import Loader
from cairn.data.shapes import shapes_dataset
from cairn.errors import DataError
from cairn.experiment.evaluator import Evaluator
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.segment import image_class
from cairn.towers.masks import mask_in_view
from cairn.training.context import Context, Log
from cairn.training.seeds import Seeds


def build(towers, *assignments):
    entry = METHODS["segment"]
    return entry.build(towers, with_settings(entry.default_config(towers), assignments), seed=1)


def patches_of(towers, images):
    """Unit patches, and the share of each that lies on the object, averaged by hand."""
    pixels = torch.cat([pixels for pixels, _ in Loader(images, towers.prepare, towers.pixels).ordered()])
    p = towers.image_and_patches(pixels, "value")[1]
    p = unit(p.flatten(0, 1)).view(p.shape)
    shares = np.zeros((len(images), 49))
    for i in range(len(images)):
        mask = mask_of(images, i)
        for a in range(7):
            for b in range(7):
                shares[i, 7 * a + b] = mask[8 * a : 8 * a + 8, 8 * b : 8 * b + 8].mean()
    return p.double(), torch.as_tensor(shares)


def test_masks_travel_with_their_images():
    scenes = shapes_dataset().train
    some = Subset(scenes, np.array([7, 300]), np.array([0, 1]))
    both = Concatenation([some, Subset(some, np.array([1]), np.array([0]))])
    for i, row in enumerate((7, 300, 300)):
        assert np.array_equal(mask_of(both, i), scenes.mask(row))
    assert mask_of(Unlabelled(scenes), 0) is None


def test_sums_are_those_of_patches_by_their_share(towers, small_stream):
    method = taught(build(towers), small_stream.tasks[:2])
    k = small_stream.tasks[1].classes.stop
    n, sums, products = torch.zeros(k + 1), torch.zeros(k + 1, towers.dim), torch.zeros(towers.dim, towers.dim)
    n, sums, products = n.double(), sums.double(), products.double()
    for task in small_stream.tasks[:2]:
        p, m = patches_of(towers, task.train)
        for i, c in enumerate(task.train.labels):
            for x, share in zip(p[i], m[i], strict=True):
                n[c + 1], n[0] = n[c + 1] + share, n[0] + 1 - share
                sums[c + 1], sums[0] = sums[c + 1] + share * x, sums[0] + (1 - share) * x
                products += x[:, None] * x
    torch.testing.assert_close(method.counts, n)
    torch.testing.assert_close(method.sums, sums, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(method.products, products, atol=1e-3, rtol=1e-4)


def test_the_discriminant_is_bayes_rule_for_normal_patches(towers, small_stream):
    """Densities by scipy, of the patches' own means and pooled covariance, each patch weighing by its shares."""
    task = small_stream.tasks[0]
    method = taught(build(towers, "ridge=0.3"), [task])
    p, m = patches_of(towers, task.train)
    x, d = p.flatten(0, 1).numpy(), towers.dim
    label = np.repeat(task.train.labels, 49)
    weights = np.stack([1 - m.flatten().numpy(), *(m.flatten().numpy() * (label == c) for c in range(2))])
    means = [np.average(x, axis=0, weights=w) for w in weights]
    S = sum((w[:, None] * (x - mu)).T @ (x - mu) for w, mu in zip(weights, means, strict=True)) / weights.sum()
    S = S + 0.3 * np.trace(S) / d * np.eye(d)
    share = weights[0].sum() / weights.sum()
    prior = [share, (1 - share) / 2, (1 - share) / 2]
    logs = np.stack(
        [np.log(w) + multivariate_normal(mu, S).logpdf(x[:60]) for w, mu in zip(prior, means, strict=True)], 1
    )
    q = method._discriminant()(p.float()).softmax(-1).flatten(0, 1)[:60]
    torch.testing.assert_close(q, torch.as_tensor(logs).softmax(1), atol=1e-3, rtol=1e-2)


def test_what_is_learned_task_by_task_is_what_is_learned_at_once(towers, small_stream):
    apart = taught(build(towers), small_stream.tasks)
    train = Concatenation([task.train for task in small_stream.tasks])
    names = tuple(name for task in small_stream.tasks for name in task.names)
    whole = taught(build(towers), [replace(small_stream.tasks[0], classes=range(6), names=names, train=train)])
    for name, value in apart.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-3, rtol=1e-4)


def test_the_class_of_an_image_is_what_its_object_says():
    """Background patches have no say, however sure they are of a class among the classes."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(4), size=(5, 9))
    f = 1 - q[..., 0]
    found = np.zeros((5, 3))
    for i in range(5):
        for j in range(9):
            found[i] += f[i, j] * np.log(q[i, j, 1:] / f[i, j])
    wanted = np.exp(found) / np.exp(found).sum(1, keepdims=True)
    confidence, best = image_class(torch.as_tensor(q[..., 1:]), torch.as_tensor(f))
    assert best.tolist() == wanted.argmax(1).tolist()
    torch.testing.assert_close(confidence, torch.as_tensor(wanted.max(1)))


def test_images_without_labels_add_patches_that_are_certain(towers, small_stream):
    task = small_stream.tasks[0]
    hidden = replace(task, unlabelled=Unlabelled(task.train))
    events = []
    method = build(towers, "threshold=0.6", "doubt=0.2")
    method.learn(hidden, Context(Seeds(1), Log(keep=events.append)))
    alone = taught(build(towers, "unlabelled=false"), [hidden])
    (told,) = [event for event in events if event["event"] == "unlabelled"]
    assert 0 < told["trusted"] <= told["images"] == len(task.train)
    added = method.counts - alone.counts
    assert float(added.sum()) == pytest.approx(told["patches"])
    assert (added >= 0).all()
    assert told["patches"] < 49 * told["trusted"]
    torch.testing.assert_close(method.labelled, alone.labelled)  # what labelled images tell of the background stays
    doubtless = taught(build(towers, "threshold=0", "doubt=0.5"), [hidden])
    assert float((doubtless.counts - alone.counts).sum()) == pytest.approx(49 * len(task.train))


def test_shares_are_probabilities_on_the_grid(towers, small_stream):
    method = taught(build(towers), small_stream.tasks[:2])
    pixels = next(iter(Loader(small_stream.tests[0], towers.prepare, towers.pixels)))[0]
    q = method.segment(method.embed(pixels))
    assert q.shape == (len(pixels), 5, 7, 7)
    torch.testing.assert_close(q.sum(1), torch.ones(len(pixels), 7, 7))
    torch.testing.assert_close(method.scores(method.embed(pixels)), q[:, 1:].mean((2, 3)).log(), atol=1e-4, rtol=1e-4)


def test_overlap_is_counted_over_all_pixels(towers, small_stream):
    """Against every pixel taken by itself, patches brought to the size of the mask bilinearly."""
    method = taught(build(towers), small_stream.tasks[:2])
    found = Evaluator(small_stream, towers).after(1, method).iou
    both, either = np.zeros(5), np.zeros(5)
    for test in small_stream.tests[:2]:
        pixels = torch.cat([pixels for pixels, _ in Loader(test, towers.prepare, towers.pixels).ordered()])
        q = method.segment(method.embed(pixels))
        taken = torch.nn.functional.interpolate(q, size=(56, 56), mode="bilinear").argmax(1).numpy()
        for i, c in enumerate(test.labels):
            truth = np.where(mask_of(test, i), c + 1, 0)
            for k in range(5):
                both[k] += ((truth == k) & (taken[i] == k)).sum()
                either[k] += ((truth == k) | (taken[i] == k)).sum()
    assert found == pytest.approx((both / either).tolist())
    zero_shot = METHODS["zero-shot"].build(towers, METHODS["zero-shot"].default_config(towers), seed=1)
    assert Evaluator(small_stream, towers).after(0, taught(zero_shot, small_stream.tasks[:1])).iou is None


def test_a_run_has_it_with_a_cache_too(tmp_path):
    config = RunConfig(method="segment", step=20, limit_train=4, limit_test=2, labelled=0.5)
    plain, cached = run_stream(config), run_stream(config, store=FeatureStore(tmp_path))
    assert len(plain.iou_by_class) == 41
    known = [value for value in plain.iou_by_class if value is not None]
    assert plain.mIoU == pytest.approx(sum(known) / len(known))
    assert 0.5 < plain.iou_by_class[0] < 1  # the background
    assert cached.mIoU == pytest.approx(plain.mIoU, abs=1e-3)


def test_on_embeddings_an_image_is_one_patch_and_nothing_is_segmented(features):
    result = run_stream(RunConfig(method="segment", data=features, step=2, labelled=0.25))
    assert result.mIoU is None
    assert result.last > 0.5


class Wide:
    """Pictures twice as wide as high, whose object is at the left end, or in the middle."""

    def __init__(self, left, size=None):
        self.left, self.size, self.labels = left, size, np.zeros(len(left), int)

    def __len__(self):
        return len(self.left)

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 255, (64 + 8 * index, 128 + 16 * index, 3), np.uint8)

    def mask(self, index):
        height, width = self.size or self[index].shape[:2]
        mask, start = np.zeros((height, width), bool), 0 if self.left[index] else 3 * width // 8
        mask[:, start : start + width // 4] = True
        return mask

    def describe(self, index):
        return f"picture {index}"

    def identity(self, index):
        return bytes([index])


def padding(towers):
    held = copy.copy(towers)
    held.preprocessing = towers.preprocessing.model_copy(update={"mode": "pad", "fill": 255})
    return held


def test_a_mask_is_cropped_as_its_picture(towers, small_stream):
    """The middle half of such a picture is seen: of an object at the left end nothing, of one in the middle half."""
    images = Wide([True, False, False])
    for i, share in enumerate((0, 0.5, 0.5)):
        assert mask_in_view(images, i, towers).shape == (56, 56)
        assert mask_in_view(images, i, towers).mean() == pytest.approx(share)
    method = build(towers)
    method.learn(replace(small_stream.tasks[0], train=images, classes=range(1), names=("strip",)), Context(Seeds(1)))
    assert float(method.counts[1]) == pytest.approx(49 * (0 + 0.5 + 0.5), abs=0.5)


def test_what_fills_a_picture_up_is_no_object(towers):
    """Even where it is white, as the objects of masks are."""
    found = mask_in_view(Wide([True]), 0, padding(towers))
    assert not found[:14].any()
    assert not found[42:].any()
    assert found[14:42, :14].all()
    assert not found[:, 14:].any()


def test_masks_of_pictures_of_many_shapes_are_measured(towers, small_stream):
    method = taught(build(towers), small_stream.tasks[:1])
    tests = (Wide([False, False, True]), *small_stream.tests[1:])
    found = Evaluator(replace(small_stream, tests=tests), towers).after(0, method).iou
    q = method.segment(method.embed(towers.pixels(torch.stack([towers.prepare(tests[0][i]) for i in range(3)]))))
    taken = torch.nn.functional.interpolate(q, size=(56, 56), mode="bilinear").argmax(1).numpy() == 1
    truth = np.zeros((3, 56, 56), bool)
    truth[:2, :, 14:42] = True
    assert found[1] == pytest.approx((truth & taken).sum() / (truth | taken).sum())


def test_a_mask_of_another_shape_is_refused(towers, small_stream):
    for size, said in (((128, 64), "mask of picture 0: 64 x 128 for a picture of 128 x 64"), ((64, 64), "64 x 64")):
        with pytest.raises(DataError, match=said):
            mask_in_view(Wide([False], size), 0, towers)
    assert np.array_equal(mask_in_view(Wide([False], (32, 64)), 0, towers), mask_in_view(Wide([False]), 0, towers))
    deep = Wide([False])
    deep.mask = lambda index: np.zeros((64, 128, 3), bool)
    with pytest.raises(DataError, match=r"of shape \(64, 128, 3\); give \(64, 128\)"):
        mask_in_view(deep, 0, towers)
