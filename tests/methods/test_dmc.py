"""DMC and DMC-OT: what moves when, and what follows."""

from __future__ import annotations

import copy

import pytest
import torch
from teaching import rows

from cairn.config import with_settings
from cairn.data.loading import Loader
from cairn.errors import ConfigError
from cairn.maths.similarity import unit
from cairn.memory.gaussians import GaussianMemory
from cairn.methods.catalogue import METHODS
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds

FAST = ("stage1.schedule.epochs=3", "stage1.schedule.lr=1e-2", "stage1.schedule.batch=8", "stage2.schedule.epochs=1")


def build(name, towers, *assignments):
    entry = METHODS[name]
    config = with_settings(entry.default_config(towers), [*FAST, *assignments])
    return entry.build(towers, config, seed=1)


def test_stage_1_moves_vision_and_leaves_texts_and_stage_2_the_other_way(flat, stream):
    only_vision = build("dmc", flat, "stage2.schedule.epochs=0")
    only_text = build("dmc", flat, "stage1.schedule.epochs=0")
    for method in (only_vision, only_text):
        method.learn(stream.tasks[0], Context(Seeds(1)))
    x = rows(stream.tasks[0].train)
    assert not torch.allclose(only_vision.embed(x), x)
    torch.testing.assert_close(only_vision.texts(), only_vision.anchors)
    assert torch.equal(only_text.embed(x), x)
    assert not torch.allclose(only_text.texts(), only_text.anchors)


def test_the_gaussians_describe_unit_features_of_the_new_encoder(flat, stream):
    method = build("dmc", flat)
    method.learn(stream.tasks[0], Context(Seeds(1)))
    task = stream.tasks[0]
    with torch.no_grad():
        z = unit(method.embed(rows(task.train))).double()
    for c in task.classes:
        torch.testing.assert_close(
            method.memory.mean(c), z[torch.as_tensor(task.train.labels) == c].mean(0), atol=1e-6, rtol=0
        )


def test_a_frozen_encoder_makes_calibration_a_no_op_to_the_bit(flat, stream):
    states = []
    for drift in ("none", "bures", "paired", "local"):
        method = build("dmc-ot", flat, "stage1.tuning=none", f"drift={drift}")
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
        states.append(method.scores(method.embed(rows(stream.tests[0]))))
    assert all(torch.equal(states[0], other) for other in states[1:])


def test_without_calibration_and_with_dmc_s_texts_dmc_ot_is_dmc(flat, stream):
    methods = [build("dmc", flat), build("dmc-ot", flat, "drift=none")]
    for method in methods:
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
    a, b = (method.scores(method.embed(rows(stream.tests[0]))) for method in methods)
    assert torch.equal(a, b)


def truth(method, tasks):
    memory = GaussianMemory(method.towers.dim, method.config.covariance, method.config.shrinkage)
    for task in tasks:
        with torch.no_grad():
            memory = memory.add(unit(method.embed(rows(task.train))), torch.as_tensor(task.train.labels))
    return memory


def test_paired_calibration_puts_old_means_nearer_to_the_truth(flat, stream):
    errors = {}
    for drift in ("none", "paired"):
        method = build("dmc-ot", flat, f"drift={drift}")
        for task in stream.tasks[:2]:
            method.learn(task, Context(Seeds(1)))
        true = truth(method, stream.tasks[:1])
        errors[drift] = sum(((method.memory.mean(c) - true.mean(c)) ** 2).sum().item() for c in range(2))
    assert errors["none"] > 1e-5
    assert errors["paired"] < 0.5 * errors["none"]


def test_an_ill_conditioned_map_falls_back_to_the_mean_with_a_warning(flat, stream):
    events = []
    method = build("dmc-ot", flat, "drift=paired", "condition_limit=1.0001")
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1), Log(keep=events.append)))
    assert any("the mean shift is used instead" in e["text"] for e in events if e["event"] == "warning")
    (told,) = [e for e in events if e["event"] == "drift"]
    assert told["fallback"]
    assert told["task"] == 1


def test_drift_events_carry_the_map_s_health(flat, stream):
    events = []
    method = build("dmc-ot", flat)
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1), Log(keep=events.append)))
    told = [e for e in events if e["event"] == "drift"]
    assert [e["task"] for e in told] == [1, 2]
    assert all(e["condition"] >= 1 and e["effective_rank"] > 0 and e["log_norm"] < 2 for e in told)


@pytest.mark.parametrize("covariance", ["full", "low_rank", "diagonal", "shared"])
@pytest.mark.parametrize("drift", ["mean", "sdc", "bures", "sinkhorn", "paired", "local"])
def test_every_estimator_moves_every_kind_of_covariance(flat, stream, covariance, drift):
    method = build("dmc-ot", flat, f"drift={drift}", f"covariance={covariance}")
    for task in stream.tasks:
        method.learn(task, Context(Seeds(1)))
    assert torch.isfinite(method.scores(method.embed(rows(stream.tests[0])))).all()
    assert torch.isfinite(method.memory.covariance(0)).all()


def test_images_pass_the_old_and_the_new_encoder_once(towers, small_stream):
    method = build("dmc-ot", towers, "stage1.schedule.epochs=0", "stage2.text.shared=2", "stage2.text.task=2")
    before = towers.passes["images"]
    for task in small_stream.tasks:
        method.learn(task, Context(Seeds(1)))
    first, *others = (len(task.train) for task in small_stream.tasks)
    assert towers.passes["images"] - before == first + 2 * sum(others)


def test_separability_pushes_new_texts_from_old_ones(flat, stream):
    worst = []
    for weight in (0, 30):
        method = build("dmc-ot", flat, "stage2.schedule.epochs=20", "stage2.schedule.lr=0.5", f"separability={weight}")
        for task in stream.tasks:
            method.learn(task, Context(Seeds(1)))
        T = method.texts().detach()
        worst.append(((T[4:] @ T[:4].T) ** 2).mean().item())
    assert worst[1] < 0.8 * worst[0]


def test_probes_pass_both_encoders_and_change_the_map_alone(towers, small_stream):
    def learned(probes):
        method = build("dmc-ot", towers, f"probes={probes}", "stage2.text=residual", "stage1.schedule.lr=1e-3")
        before = towers.passes["images"]
        for task in small_stream.tasks[:2]:
            method.learn(task, Context(Seeds(1)))
        return method, towers.passes["images"] - before

    (plain, passes), (probed, more) = learned(0), learned(2)
    assert more - passes == 2 * 2 * len(small_stream.tasks[1].train)
    old = len(small_stream.tasks[0].names)
    assert not torch.allclose(plain.memory.means[:old], probed.memory.means[:old])
    assert torch.equal(plain.memory.means[old:], probed.memory.means[old:])


def test_probes_of_a_features_file_are_refused(flat):
    with pytest.raises(ConfigError, match="set probes=0"):
        build("dmc-ot", flat, "probes=1")


class Pieces(Checkpoint):
    """Keeps the work after every step."""

    def __init__(self):
        super().__init__(steps=1)
        self.kept: list[dict] = []
        self.kept_by(lambda work: self.kept.append(copy.deepcopy(work)))


def test_dropout_changes_what_is_learned_and_follows_the_seeds_alone(towers, small_stream):
    """The same to the bit in a second run, and in one that goes on in the middle of an epoch of stage 1."""
    pixels = next(iter(Loader(small_stream.tests[0], towers.prepare, towers.pixels)))[0]

    def learned(dropout, checkpoint=None):
        method = build("dmc", towers, "stage2.schedule.epochs=0", f"stage1.tuning.dropout={dropout}")
        torch.manual_seed(len(pieces.kept))  # what others draw does not matter
        method.learn(small_stream.tasks[0], Context(Seeds(1), checkpoint=checkpoint or Checkpoint()))
        with torch.no_grad():
            return method.embed(pixels)

    pieces = Pieces()
    whole = learned(0.5, pieces)
    assert torch.equal(whole, learned(0.5))
    assert not torch.allclose(whole, learned(0), atol=1e-3)
    assert not torch.allclose(whole, learned(0.9), atol=1e-3)
    middle = [work for work in pieces.kept if "fit-task=0-stage=1" in work]
    assert len(middle) >= 6
    for work in (middle[0], middle[3]):
        again = Checkpoint()
        again.begin(work)
        assert torch.equal(learned(0.5, again), whole)


@pytest.mark.parametrize("freeze", [True, False])
def test_prompts_of_finished_tasks_move_only_where_they_are_not_frozen(freeze, towers, small_stream):
    prompts = f"kind: prompts, shared: 1, task: 2, per_class: 1, freeze_old: {freeze}"
    method = build("dmc", towers, f"stage2.text={{{prompts}}}", "stage1.schedule.epochs=0")
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    own = method.texts
    texts, task, per_class = (t.detach().clone() for t in (own(), own.task[0], own.per_class[0]))
    method.learn(small_stream.tasks[1], Context(Seeds(1)))
    for before, after in ((texts, own()[:2]), (task, own.task[0]), (per_class, own.per_class[0])):
        assert torch.equal(after, before) == freeze
        assert freeze or (after - before).abs().max() > 1e-4
    assert not torch.equal(own()[2:], method.anchors[2:])  # the new task's are trained either way
    assert own.task[1].grad is not None
    assert own.per_class[1].grad is not None
