"""FM-LoRA: what trains and when, how many numbers, which rank, and what a resumed run draws."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import few_classes
from teaching import taught

from cairn.config import with_settings
from cairn.data.loading import Loader
from cairn.data.shapes import shapes_dataset
from cairn.data.stream import task_stream
from cairn.errors import ConfigError
from cairn.experiment.run import run_stream
from cairn.experiment.schema import RunConfig
from cairn.maths.losses import class_cross_entropy
from cairn.maths.ranks import candidate_ranks, gumbel
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.fm_lora import FmLoraConfig, Gumbel, GumbelGate, NoisyLoader
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds


def build(towers, *assignments, seed=1):
    entry = METHODS["fm-lora"]
    config = with_settings(entry.default_config(towers), ["schedule.epochs=2", "schedule.batch=8", "subspace=8"])
    return entry.build(towers, with_settings(config, assignments), seed=seed)


@pytest.fixture
def flat_tasks(flat, embedded_dataset):
    return flat, task_stream(embedded_dataset, step=2).tasks


def told(method, tasks):
    """The method after these tasks, and what it told of each."""
    events = []
    for task in tasks:
        method.learn(task, Context(Seeds(1), Log(keep=events.append)))
    return method, events


def factors(method):
    return {key: value.clone() for key, value in method.image.state_dict().items()}


# --- what trains ------------------------------------------------------------------------------------------------------


def test_bases_train_with_the_first_task_and_stand_afterwards(towers, small_stream):
    method = build(towers)
    start = factors(method)
    states = [factors(taught(method, [task])) for task in small_stream.tasks[:2]]
    for name in ("0.U", "0.V"):
        assert not torch.equal(start[name], states[0][name])
        assert torch.equal(states[0][name], states[1][name])
    for name in ("0.C", "P"):
        assert not torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize(("bases", "moves"), [("always", [True, True]), ("never", [False, False])])
def test_bases_train_always_or_never(flat_tasks, bases, moves):
    flat, tasks = flat_tasks
    method = build(flat, f"bases={bases}")
    states = [factors(method), *(factors(taught(method, [task])) for task in tasks[:2])]
    assert [not torch.equal(a["0.U"], b["0.U"]) for a, b in pairwise(states)] == moves


@pytest.mark.parametrize("assignments", [(), ("rank=fixed", "rank.rank=3"), ("rank=energy", "tuning.prompts=0")])
def test_trained_numbers_are_those_of_the_formula(towers, small_stream, assignments):
    """With the first task 2 L R w of the bases, in all 2 L R r of the task's own, p w of tokens and q of the ranks; and what is
    stored does not grow with the tasks."""
    method, events = told(build(towers, *assignments), small_stream.tasks)
    R, width = 8, towers._model.config.vision_config.hidden_size
    L, p = 2 * towers._model.config.vision_config.num_hidden_layers, 0 if "tuning.prompts=0" in assignments else 4
    r, q = (3 if "rank=fixed" in assignments else R), (0 if assignments else len(candidate_ranks(R)))
    own = 2 * L * R * r + p * width + q
    trained = [event["parameters"] for event in events if event["event"] == "epoch" and event["epoch"] == 0]
    assert trained == [own + 2 * L * R * width, own, own]
    assert [event["trained"] for event in events if event["event"] == "rank"] == trained
    held = sum(value.numel() for key, value in method.image.state_dict().items() if key != "version")
    assert held == L * (2 * R * width + R * R) + p * width


def test_tokens_begin_near_the_mean_patch_and_are_held_from_the_second_task_on(towers, small_stream):
    loader = Loader(small_stream.tasks[0].train, towers.prepare, towers.pixels)
    embeddings = towers.vision().vision_model.embeddings
    mean = torch.cat([embeddings(pixels)[:, 1:].mean(1) for pixels, _ in loader]).mean(0)
    method = build(towers, "schedule.lr=1e-9")
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    P = method.image.state_dict()["P"]
    torch.testing.assert_close((P - mean).norm(dim=1) / mean.norm(), torch.full((4,), 0.02), atol=5e-3, rtol=0)
    assert not torch.equal(P[0], P[1])
    moved = {}
    for weight in (0.0, 1e4):
        method = build(towers, f"tuning.prompts_anchor={weight}")
        before = factors(taught(method, small_stream.tasks[:1]))["P"]
        moved[weight] = (factors(taught(method, small_stream.tasks[1:2]))["P"] - before).norm().item()
    assert moved[1e4] < moved[0.0] / 2


def test_before_anything_is_learned_embeddings_are_the_towers(towers, small_stream):
    pixels = next(iter(Loader(small_stream.tests[0], towers.prepare, towers.pixels)))[0]
    torch.testing.assert_close(build(towers).embed(pixels), towers.image(pixels), atol=1e-6, rtol=1e-6)


def test_a_step_follows_the_written_loss(flat_tasks, monkeypatch):
    """CE(s z T_b^T, y) + price sum_j p_j r_j / R, by hand, in the first step of the second task."""
    flat, tasks = flat_tasks
    method, seen = build(flat, "rank.price=0.3"), []
    method.learn(tasks[0], Context(Seeds(1)))

    def watched(loss, parameters, batches, schedule, ctx, *, rates):
        epochs = batches.epochs([ctx.seeds.at(epoch=epoch).generator("batches") for epoch in range(2)])
        (pixels, noise, progress), y = next(next(epochs))
        layer, gate_theta = method.image.layers[0], parameters[2]
        with torch.no_grad():
            layer.N += 0.1
        seen.append((loss((pixels, noise, progress), y).item(), pixels, noise, y, layer, gate_theta, rates))

    monkeypatch.setattr("cairn.methods.fm_lora.fit", watched)
    with monkeypatch.context() as patch:
        patch.setattr(
            "cairn.methods.fm_lora.GumbelGate.closed", lambda own, layers: _by_hand(own, seen[0], method, tasks)
        )
        method.learn(tasks[1], Context(Seeds(1)))
    assert seen[0][-1] == [1.0, 1.0, 10.0]


def _by_hand(gate, seen, method, tasks):
    found, pixels, noise, y, layer, _, _ = seen
    p = ((gate.prior + gate.theta.detach() + noise) / gate.choice.warm).softmax(0)
    r = torch.tensor([1, 2, 4, 8])
    m = torch.stack([(p * (r >= i)).sum() for i in range(1, 9)])
    W = torch.eye(16) + layer.U @ (layer.C + layer.M * m @ layer.N) @ layer.V
    T = method.anchors[tasks[1].classes.start :]
    wanted = class_cross_entropy(unit(pixels @ W.T), T, y - tasks[1].classes.start, method.towers.logit_scale)
    torch.testing.assert_close(torch.tensor(found), (wanted + 0.3 * (p * r).sum() / 8).detach())
    return 8


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_the_rank_rises_with_how_hard_a_task_is():
    def rank(h):
        gate = GumbelGate(Gumbel(), 16, h, torch.device("cpu"))
        return gate.closed([])

    found = [rank(h) for h in (0.0, 0.1, 0.25, 0.5, 0.9)]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == 16


def test_the_price_lowers_the_rank_and_none_lets_it_rise(flat_tasks):
    flat, tasks = flat_tasks
    rates = ("rank.rate=300", "rank.spread=0.6", "schedule.epochs=4")
    dear, cheap = (taught(build(flat, *rates, f"rank.price={price}"), tasks).ranks for price in (30.0, 0.0))
    assert sum(dear) < sum(cheap)


def test_the_mask_is_of_one_rank_in_the_last_tenth():
    gate = GumbelGate(Gumbel(), 8, 0.4, torch.device("cpu"))
    noise = gumbel((4,), torch.Generator().manual_seed(2))
    soft, _ = gate.opened(noise, 0.5)
    hard, price = gate.opened(noise, 0.95)
    assert 0 < soft[3] < 1
    assert set(hard.round(decimals=5).tolist()) <= {0.0, 1.0}
    assert price.item() == pytest.approx(0.01 * hard.sum().item() / 8)


def test_ranks_are_told_with_what_they_come_from(flat_tasks):
    flat, tasks = flat_tasks
    method, events = told(build(flat), tasks)
    said = [event for event in events if event["event"] == "rank"]
    assert [event["rank"] for event in said] == method.ranks
    for event in said:
        assert 0 <= event["hardness"] <= 1
        assert event["ranks"] == [1, 2, 4, 8]
        assert event["rank"] == event["ranks"][max(range(4), key=event["weights"].__getitem__)]


@pytest.mark.parametrize("rank", ["rank=fixed", "rank=energy", "rank=gumbel"])
def test_what_a_task_leaves_has_its_rank(flat_tasks, rank):
    flat, tasks = flat_tasks
    method = build(flat, rank, *(["rank.rank=2"] if rank == "rank=fixed" else []))
    before = method.image.layers[0].C.clone()
    for task in tasks:
        method.learn(task, Context(Seeds(1)))
        C = method.image.layers[0].C.clone()
        assert torch.linalg.matrix_rank((C - before).double(), rtol=1e-4) <= method.ranks[-1]
        before = C
    assert rank != "rank=fixed" or method.ranks == [2, 2, 2]


def test_all_energy_is_all_that_was_trained(flat_tasks):
    flat, tasks = flat_tasks
    whole, fixed = (
        taught(build(flat, *how), tasks[:1]) for how in (("rank=energy", "rank.share=1"), ("rank=fixed", "rank.rank=8"))
    )
    torch.testing.assert_close(whole.image.layers[0].C, fixed.image.layers[0].C, atol=1e-5, rtol=1e-4)


def test_the_result_has_the_rank_of_each_task(monkeypatch):
    call = {"data": "shapes", "step": 2, "limit_train": 2, "limit_test": 1, "order": "seed:3"}
    settings = {"schedule.epochs": 1, "schedule.batch": 8, "rank": "fixed", "rank.rank": 3}
    monkeypatch.setattr("cairn.experiment.inputs.open_dataset", lambda data: few_classes(shapes_dataset(), 4))
    assert run_stream(RunConfig(method="fm-lora", settings=settings, **call)).ranks == [3, 3]
    assert run_stream(RunConfig(method="zero-shot", **call)).ranks is None


def test_a_task_without_another_class_trains_nothing(flat, embedded_dataset):
    tasks = task_stream(embedded_dataset, step=1).tasks
    method = taught(build(flat), tasks[:2])
    assert method.ranks[0] == 0
    assert method.ranks[1] > 0


# --- batches ----------------------------------------------------------------------------------------------------------


def test_noise_comes_with_the_batch_and_is_the_same_after_a_stop(flat_tasks):
    flat, tasks = flat_tasks

    def epochs(first, skip, share=(0, 1)):
        loader = NoisyLoader(tasks[0].train, flat.prepare, flat.pixels, batch=8)
        loader.numbers, loader.total = 3, 4
        rngs = [torch.Generator().manual_seed(epoch) for epoch in range(first, 4)]
        return [list(epoch) for epoch in loader.epochs(rngs, skip, share)]

    whole, again = epochs(0, 0), epochs(2, 3)
    for full, rest in zip((whole[2][3:], whole[3]), again, strict=True):
        for ((x, g, t), y), ((x1, g1, t1), y1) in zip(full, rest, strict=True):
            assert torch.equal(x, x1)
            assert torch.equal(g, g1)
            assert torch.equal(y, y1)
            assert t == t1
    progress = [t for epoch in whole for (_, _, t), _ in epoch]
    assert progress == [i / len(progress) for i in range(len(progress))]
    parts = [epochs(0, 0, (rank, 2)) for rank in (0, 1)]
    for batch, ((x, g, _), _), ((x1, g1, _), _) in zip(whole[0], parts[0][0], parts[1][0], strict=True):
        assert torch.equal(batch[0][1], g)
        assert torch.equal(g, g1)
        assert len(x) + len(x1) == len(batch[0][0])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_features_file_has_no_tower_to_adapt(flat):
    with pytest.raises(ConfigError, match="tuning 'layers': a features file has no tower to tune; take adapter"):
        METHODS["fm-lora"].build(flat, FmLoraConfig(), seed=1)


def test_behind_a_tower_one_layer_trains(towers, small_stream):
    method = taught(build(towers, "tuning=adapter"), small_stream.tasks[:2])
    pixels = next(iter(Loader(small_stream.tests[0], towers.prepare, towers.pixels)))[0]
    layer = method.image.layers[0]
    wanted = towers.image(pixels) @ (torch.eye(towers.dim) + layer.U @ layer.C @ layer.V).T
    torch.testing.assert_close(method.embed(pixels), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(method.vision()(pixels), method.embed(pixels), atol=1e-5, rtol=1e-5)
