"""What is told of towers, prompts, order or split that are not those of the figures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn.data.images import Subset
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import class_order
from cairn.reproduce.checks import Curve, copy_differences, curve, distance, likely_causes
from cairn.reproduce.figures import Copy, Published
from cairn.reproduce.plan import embedded, reproduction
from cairn.towers.preprocessing import CLIP_MEAN, CLIP_STD


def figures(average, last, order="natural"):
    return Published.model_validate(
        {
            "settings": {"own": {"title": "own", "towers": ["tiny"], "order": order}},
            "source": [
                {
                    "name": "own", "cite": "here", "setting": "own",
                    "figures": [("shapes", 0, 5, "zero-shot", 100 * average, "?" if last is None else 100 * last)],
                }
            ],
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def data():
    """A tenth of the drawn world, every class in it."""
    whole = shapes_dataset()
    rows = np.arange(0, len(whole.test), 4)
    return replace(whole, test=Subset(whole.test, rows, whole.test.labels[rows]))


def measured(data, towers, order="natural"):
    rows = np.arange(len(data.test))
    features = torch.nn.functional.normalize(embedded(towers, data.test, rows), dim=-1)
    scores = features @ towers.class_texts(data.classes, data.templates).T
    return curve(scores, torch.from_numpy(data.test.labels), class_order(order, data.classes), 0, 5)


@pytest.fixture(scope="module")
def right(data, towers):
    return measured(data, towers)


def told(data, towers, right, order="natural"):
    asked = reproduction("shapes", "tiny", figures(right.average, right.last, order))
    return likely_causes(asked, data, towers, asked.figures[0], measured(data, towers, order))


def test_another_activation_is_told(data, towers, right):
    wrong = towers.varied(activation="gelu" if towers.activation == "quick_gelu" else "quick_gelu")
    assert wrong.fingerprint != towers.fingerprint
    assert distance(figures(right.average, right.last).figures("own", "shapes")[0], measured(data, wrong)) > 0.005
    assert told(data, wrong, right)[0].what == "activation"
    assert towers.activation in told(data, wrong, right)[0].otherwise


def test_the_variation_leaves_the_towers_as_they_were(data, towers, right):
    towers.varied(activation="relu")
    assert measured(data, towers) == right


def test_another_preprocessing_is_told(data, towers, right):
    read = towers.preprocessing
    assert (read.mean, read.std) == (CLIP_MEAN, CLIP_STD)
    wrong = towers.varied(preprocessing=read.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    assert told(data, wrong, right)[0].what == "preprocessing"


def test_other_prompts_are_told(data, towers):
    right = measured(replace(data, templates=("a photo of a {}.",)), towers)
    wrong = replace(data, templates=("{} is what it is not",))
    assert told(wrong, towers, right)[0].what == "prompts"
    assert "'a photo of a {}.'" in told(wrong, towers, right)[0].otherwise


def test_a_small_effect_is_told_too(data, towers, right):
    """The embedded towers hardly tell activations apart: a difference of two images of 250 is explained, and only by its cause."""
    wrong = towers.varied(activation="gelu" if towers.activation == "quick_gelu" else "quick_gelu")
    off = measured(data, wrong)
    assert 0 < max(abs(off.average - right.average), abs(off.last - right.last)) < 0.02
    assert {cause.what for cause in told(data, wrong, right)} == {"activation"}


def test_the_data_sets_own_prompts_are_told(data, towers):
    right, wrong = measured(data, towers), replace(data, templates=("{}",))
    asked = reproduction("shapes", "tiny", figures(right.average, right.last))
    first = likely_causes(asked, wrong, towers, asked.figures[0], measured(wrong, towers), data.templates)[0]
    assert first.what == "prompts"
    assert "the mean of 4 templates in place of '{}'" in str(first)


def test_another_class_order_is_told(data, towers):
    right = measured(data, towers, "seed:1993")
    first = told(data, towers, right, "natural")[0]
    assert (first.what, first.otherwise) == ("class order", "--order seed:1993")
    assert "would give" in str(first)


def test_other_weights_are_none_of_these(data, towers, right):
    assert told(data, towers, Curve(right.average - 0.3, right.last - 0.3)) == []


def test_sizes_of_a_copy(data):
    assert copy_differences(None, data) == []
    assert copy_differences(Copy(key="shapes", classes=40), data) == []
    (found,) = copy_differences(Copy(key="shapes", classes=40, test=1000), data)
    assert "250 test images" in found
    assert "1,000" in found


@pytest.mark.parametrize(("order", "base", "step"), [("natural", 0, 2), ("seed:1993", 3, 2), ("seed:5", 0, 7)])
def test_the_curve_is_that_of_a_loop(order, base, step):
    rng = np.random.default_rng(0)
    names = tuple(f"c{i}" for i in range(7))
    scores, labels = torch.from_numpy(rng.normal(size=(50, 7))), torch.from_numpy(rng.integers(0, 7, 50))
    arrival, seen, accuracies, sizes = class_order(order, names), [], [], [base] if base else []
    while sum(sizes) < 7:
        sizes.append(min(step, 7 - sum(sizes)))
    for size in sizes:
        seen += arrival[len(seen) : len(seen) + size].tolist()
        right = [max(seen, key=lambda c, i=i: scores[i, c]) == labels[i] for i in range(50) if labels[i] in seen]
        accuracies.append(np.mean(right))
    found = curve(scores, labels, arrival, base, step)
    assert (found.average, found.last) == pytest.approx((np.mean(accuracies), accuracies[-1]))
