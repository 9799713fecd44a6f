"""Towers that look embeddings up: the same numbers, without a pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cairn.data.feature_store import FeatureStore
from cairn.data.images import Concatenation, Subset
from cairn.data.loading import Loader
from cairn.data.shapes import shapes_dataset
from cairn.errors import NotFinite
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.towers.cached import BATCH, CachedTowers, kept
from cairn.towers.protocol import Towers
from cairn.training.encode import encode
from cairn.training.log import Log


@pytest.fixture
def store(tmp_path):
    return lambda **options: FeatureStore(tmp_path / "cache", **options)


@pytest.fixture
def images():
    """70 scenes of the drawn world: not a whole number of batches."""
    return Subset(data := shapes_dataset().train, rows := np.arange(0, 7000, 100), data.labels[rows])


def seen(towers, images, ask, batch=16):
    return encode(Loader(images, towers.prepare, towers.pixels, batch=batch), lambda pixels, _: ask(pixels))[0]


def test_kept_towers_are_towers(towers, store):
    knowing = CachedTowers(towers, store())
    assert isinstance(knowing, Towers)
    assert knowing.device == towers.device
    assert knowing.preprocessing is towers.preprocessing  # beyond the protocol


def test_embeddings_and_patches_are_the_towers_own_and_come_without_a_pass(towers, store, images):
    z = seen(towers, images, towers.image)
    p = {a: seen(towers, images, lambda x, a=a: towers.image_and_patches(x, a)[1]) for a in ("native", "value")}
    for time in ("first", "second"):
        knowing = CachedTowers(towers, store())
        own, before = knowing.placed(images), towers.passes["images"]
        for attention, patches in p.items():
            pairs = [knowing.image_and_patches(x, attention) for x, _ in Loader(own, knowing.prepare, knowing.pixels)]
            got, local = map(torch.cat, zip(*pairs, strict=True))
            torch.testing.assert_close(got, z, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(local, patches, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(seen(knowing, own, knowing.image), z, atol=1e-6, rtol=1e-6)
        whole = -(-len(images) // BATCH) * BATCH
        assert towers.passes["images"] - before == (2 * whole if time == "first" else 0)


def test_who_asked_first_and_beside_what_does_not_matter(towers, tmp_path, images):
    def rows(folder, *orders):
        for order in orders:
            knowing = CachedTowers(towers, FeatureStore(tmp_path / folder))
            got = seen(knowing, knowing.placed(Subset(images, order, images.labels[order])), knowing.image)
        return got

    everything = np.arange(70)
    alone = rows("a", everything)
    backwards = rows("b", everything[::-1], everything)
    piecemeal = rows("c", everything[3:40:7], everything[-1:], everything)
    assert torch.equal(alone, backwards)
    assert torch.equal(alone, piecemeal)


def test_places_go_through_views_and_in_any_batch(towers, store, images):
    knowing = CachedTowers(towers, store())
    parts = [knowing.placed(Subset(images, rows, images.labels[rows])) for rows in np.split(np.arange(70), [30])]
    both = Concatenation([Subset(part, np.arange(0, 30, 3), part.labels[:30:3]) for part in parts])
    z, _ = encode(Loader(both, knowing.prepare, knowing.pixels, batch=7), lambda pixels, _: knowing.image(pixels))
    expected = np.r_[0:30:3, 30:60:3]
    torch.testing.assert_close(z, seen(towers, images, towers.image)[expected], atol=1e-6, rtol=1e-6)
    assert both.identity(11) == images.identity(33)
    assert both.describe(11) == images.describe(33)


def test_what_is_no_place_goes_through_the_tower(towers, store, images):
    knowing = CachedTowers(towers, store())
    torch.testing.assert_close(seen(knowing, images, knowing.image), seen(towers, images, towers.image))
    assert not store().folder.exists()


def test_half_precision_comes_out_as_float32_and_close(towers, store, images):
    knowing = CachedTowers(towers, store(patches="float16"))
    own = knowing.placed(images)
    pixels = next(iter(Loader(own, knowing.prepare, knowing.pixels)))[0]
    z, p = knowing.image_and_patches(pixels, "value")
    real = next(iter(Loader(images, towers.prepare, towers.pixels)))[0]
    exact, patches = towers.image_and_patches(real, "value")
    assert p.dtype == torch.float32
    torch.testing.assert_close(z, exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(p, patches, atol=1e-2, rtol=1e-3)


def test_images_are_not_opened_again_and_those_of_later_tasks_not_yet(towers, small_stream, store):
    class Watched:
        def __init__(self, images):
            self.images, self.labels, self.opened = images, images.labels, 0

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            self.opened += 1
            return self.images[index]

        def identity(self, index):
            return self.images.identity(index)

    for expected in (len(small_stream.tasks[0].train), 0):
        watched = [Watched(task.train) for task in small_stream.tasks]
        tasks = tuple(replace(task, train=own) for task, own in zip(small_stream.tasks, watched, strict=True))
        stream, knowing = kept(replace(small_stream, tasks=tasks), towers, store())
        seen(knowing, stream.tasks[0].train, knowing.image)
        assert [own.opened for own in watched] == [expected, 0, 0]


# --- whole runs ---

SMALL = {"data": "shapes", "step": 20, "limit_train": 3, "limit_test": 2, "device": "cpu"}
FAST = ("stage1.schedule.epochs=1", "stage2.schedule.epochs=1")


def numbers(result):
    return result.accuracy, result.future_accuracy, result.seen_accuracy_by_class, result.memory_bytes, result.split


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("zero-shot", ()),
        ("simplecil", ()),
        ("spa", ("schedule.epochs=1",)),
        ("dmc", (*FAST, "stage1.tuning=adapter")),
        ("dmc-ot", (*FAST, "stage1.tuning=none", "stage2.text=residual")),
        ("finetune", (FAST[0], "stage1.tuning=adapter")),
        ("dmc", (*FAST, "stage1.tuning=none", "stage2.text=prompts")),
        ("ranpac", ("width=50",)),
        ("rapf", ("schedule.epochs=1",)),
    ],
)
def test_a_second_run_makes_no_pass_and_gives_the_same_numbers(store, method, settings):
    config = RunConfig(method=method, settings=settings, **SMALL)
    plain, first, second = run_stream(config), run_stream(config, store=store()), run_stream(config, store=store())
    assert numbers(plain) == numbers(first) == numbers(second)
    assert first.evaluation_passes.images > 0
    assert (second.tower_passes.images, second.evaluation_passes.images) == (0, 0)
    assert second.evaluation_passes.stored == 80
    assert second.tower_passes.stored == (0 if method in ("zero-shot",) else 120)
    assert (plain.tower_passes.stored, plain.evaluation_passes.stored) == (0, 0)


def test_another_order_step_and_method_find_what_was_kept(store):
    run_stream(RunConfig(method="spa", settings=("schedule.epochs=0",), **SMALL), store=store())
    config = RunConfig(method="simplecil", **(SMALL | {"order": "seed:5", "step": 10, "limit_train": 2}))
    result = run_stream(config, store=store())
    assert (result.tower_passes.images, result.evaluation_passes.images) == (0, 0)
    assert numbers(result) == numbers(run_stream(config))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dmc", FAST),
        ("joint", (*FAST, "stage1.tuning=adapter")),
        ("engine", ("schedule.epochs=1",)),
        ("aper", ("schedule.epochs=1",)),
        ("ranpac", ("width=50", "tuning=lora", "schedule.epochs=1")),
        ("dmc-ot", (*FAST, "stage1.tuning=adapter", "probes=1", "stage2.text=residual")),
    ],
)
def test_a_method_that_needs_the_images_runs_without(store, method, settings):
    events = []
    config = RunConfig(method=method, settings=settings, **(SMALL | {"limit_train": 1, "limit_test": 1}))
    result = run_stream(config, Log(keep=events.append), store=store())
    assert any(f"the cache is not used: {method} needs the images" in event.get("text", "") for event in events)
    assert result.evaluation_passes.stored == 0
    assert not store().folder.exists()


def test_embeddings_that_are_given_are_not_kept(store, features):
    events = []
    run_stream(RunConfig(method="simplecil", data=features, step=2), Log(keep=events.append), store=store())
    assert any("embeddings are given" in event.get("text", "") for event in events)
    assert not store().folder.exists()


def test_rows_that_are_not_finite_are_not_kept(towers, store, images, monkeypatch):
    """In bfloat16 what is large may overflow; a row in the store would be taken ever after."""
    knowing = CachedTowers(towers, store())
    monkeypatch.setattr(type(towers), "image", lambda self, pixels: torch.full((len(pixels), towers.dim), float("nan")))
    own = knowing.placed(images)
    with pytest.raises(NotFinite, match="is not finite"):
        seen(knowing, own, knowing.image)
    monkeypatch.undo()
    assert seen(knowing, own, knowing.image).isfinite().all()
