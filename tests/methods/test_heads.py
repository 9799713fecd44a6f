"""Heads in closed form, and encoders adapted once: LDA, ACIL, RanPAC, APER, each against its equation written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from cairn.data.images import Concatenation
from cairn.data.loading import Loader
from cairn.data.stream import task_stream
from cairn.errors import NotFinite
from cairn.maths.shrinkage import Ridge
from cairn.maths.similarity import unit
from cairn.memory.means import ClassMeans
from cairn.methods import acil, aper, lda, ranpac
from cairn.methods.parts.random_features import RandomFeatures
from cairn.towers.tuning import Bottleneck, Full, Lora
from cairn.training.context import Context
from cairn.training.fit import Schedule
from cairn.training.log import Log
from cairn.training.seeds import Seeds


@pytest.fixture
def embedded(embedded_dataset):
    return task_stream(embedded_dataset, step=2)


def learned(build, config, stream, towers, events=None):
    log = Log() if events is None else Log(keep=events.append)
    method = build(towers, config, seed=5)
    for task in stream.tasks:
        method.learn(task, Context(Seeds(5), log))
    return method


def rows_of(images):
    return torch.from_numpy(np.stack([images[i] for i in range(len(images))])), torch.from_numpy(images.labels)


def everything(stream):
    """Training rows, their labels, test rows."""
    x, y = rows_of(Concatenation([task.train for task in stream.tasks]))
    return x, y, torch.cat([rows_of(test)[0] for test in stream.tests])


# --- LDA ---------------------------------------------------------------------------------------------------------------


def test_lda_ranks_classes_as_scikit_learn_does(embedded, flat):
    method = learned(lda.LDA, lda.LdaConfig(shrinkage=Ridge(eps=1e-12)), embedded, flat)
    x, y, test = everything(embedded)
    judge = LinearDiscriminantAnalysis(solver="eigen", priors=np.full(6, 1 / 6)).fit(
        unit(x).double().numpy(), y.numpy()
    )
    ours = method.scores(test).double().log_softmax(1)
    theirs = torch.from_numpy(judge.predict_log_proba(unit(test).double().numpy()))
    likely = theirs > -20
    torch.testing.assert_close(ours[likely], theirs[likely], rtol=1e-3, atol=1e-3)


def test_lda_scores_are_log_densities_up_to_one_constant(embedded, flat):
    for kind in ("shared", "full", "diagonal"):
        method = learned(lda.LDA, lda.LdaConfig(covariance=kind), embedded, flat)
        _, _, test = everything(embedded)
        naive = torch.stack(
            [
                torch.distributions.MultivariateNormal(method.memory.mean(c), method.memory.covariance(c)).log_prob(
                    unit(test).double()
                )
                for c in range(6)
            ],
            1,
        )
        ours = method.scores(test).double()
        difference = naive - ours
        assert (difference - difference.mean()).abs().max() < 1e-3 * naive.abs().max()


# --- ACIL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 40])
def test_acil_is_joint_ridge_regression_after_every_task(width, embedded, flat):
    config = acil.AcilConfig(width=width, ridge=0.3)
    method, seen = acil.ACIL(flat, config, seed=5), []
    for task in embedded.tasks:
        method.learn(task, Context(Seeds(1)))
        seen.append(task.train)
        x, y = rows_of(Concatenation(seen))
        H = method.random(x).double()
        Y = torch.nn.functional.one_hot(y, task.classes.stop).double()
        exact = torch.linalg.solve(H.T @ H + 0.3 * torch.eye(H.shape[1], dtype=torch.float64), H.T @ Y)
        assert (method.W - exact).abs().max() < 1e-8
    assert method.random.width == (width or flat.dim)


def test_random_features_are_a_relu_of_a_projection_that_the_seed_decides(embedded):
    x = everything(embedded)[2]
    one, same, other = RandomFeatures(16, 30, 1), RandomFeatures(16, 30, 1), RandomFeatures(16, 30, 2)
    naive = torch.tensor([[max(0.0, float((row / row.norm()) @ v)) for v in one.V.T] for row in x[:3]])
    torch.testing.assert_close(one(x[:3]), naive)
    assert torch.equal(one(x), same(x))
    assert not torch.equal(one(x), other(x))
    torch.testing.assert_close(RandomFeatures(16, 0, 1)(x), unit(x))


# --- RanPAC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 400])
def test_ranpac_solves_for_the_sums_over_all_tasks(width, embedded, flat):
    """With fewer and with more random features than images; at ridges above the rounding of sums in float32."""
    events = []
    method = learned(ranpac.RanPAC, ranpac.RanpacConfig(width=width, lowest=-1), embedded, flat, events)
    x, y, test = everything(embedded)
    H = torch.relu(unit(x) @ method.random.V).double()
    G, C = H.T @ H, H.T @ torch.nn.functional.one_hot(y, 6).double()
    lam = [event["chosen"] for event in events if event["event"] == "ridge"][-1]
    naive = torch.linalg.solve(G + lam * torch.eye(width, dtype=torch.float64), C)
    torch.testing.assert_close(
        method.scores(test).double(),
        flat.logit_scale * torch.relu(unit(test) @ method.random.V).double() @ naive,
        rtol=1e-3,
        atol=2e-3,
    )


def test_ranpac_chooses_the_ridge_on_held_out_images_of_the_task(embedded, flat):
    events, config = [], ranpac.RanpacConfig(width=60, lowest=-2, highest=2)
    method = learned(ranpac.RanPAC, config, embedded, flat, events)
    chosen = [event["chosen"] for event in events if event["event"] == "ridge"]
    first = embedded.tasks[0]
    x, y = rows_of(first.train)
    H, Y = method.random(x).double(), torch.nn.functional.one_hot(y, 2).double()
    order = torch.randperm(len(x), generator=Seeds(5).at(task=0).generator("held-out"))
    out, rest = order[:12], order[12:]  # a fifth of 60

    def error(lam):
        W = torch.linalg.solve(H[rest].T @ H[rest] + lam * torch.eye(60, dtype=torch.float64), H[rest].T @ Y[rest])
        return ((H[out] @ W - Y[out]) ** 2).mean()

    assert chosen[0] == min([0.01, 0.1, 1.0, 10.0, 100.0], key=error)


def test_near_the_last_ridge_ranpac_finds_what_trying_all_finds(embedded, flat):
    chosen = []
    for search in ("near", "all"):
        events = []
        learned(ranpac.RanPAC, ranpac.RanpacConfig(width=60, search=search), embedded, flat, events)
        chosen.append([event["chosen"] for event in events if event["event"] == "ridge"])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("start", range(5))
def test_a_descent_ends_at_the_minimum_of_what_has_one(start):
    asked = []
    assert ranpac.descended(lambda i: asked.append(i) or (i - 3) ** 2, start, 5) == 3
    assert set(asked) <= set(range(5))
    assert ranpac.descended(lambda i: [2, 3, 1][i], 0, 3) == 0  # of two minima, the near one


def test_ranpac_tells_when_no_ridge_has_a_solution(embedded, flat):
    copies = replace(embedded.tasks[0], train=Concatenation([embedded.tasks[0].train] * 3))
    method = ranpac.RanPAC(flat, ranpac.RanpacConfig(width=500, lowest=-30, highest=-30), seed=1)
    with pytest.raises(NotFinite, match="none has a solution; raise highest"):
        method.learn(copies, Context(Seeds(1)))


def test_ranpac_tunes_the_encoder_on_the_first_task_alone(small_stream, towers):
    config = ranpac.RanpacConfig(width=50, tuning=Lora(), schedule=Schedule(epochs=1, batch=8, lr=0.01))
    method, states = ranpac.RanPAC(towers, config, seed=1), []
    assert method.encoder != "frozen"
    for task in small_stream.tasks:
        method.learn(task, Context(Seeds(1)))
        states.append(method.image.state_dict())
    assert method.image.version == 1
    assert any(
        not torch.equal(states[0][key], value)
        for key, value in ranpac.RanPAC(towers, config, seed=1).image.state_dict().items()
    )
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])


# --- APER --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [Bottleneck(width=8), Lora()], ids=lambda tuning: tuning.kind)
def test_aper_compares_with_means_of_both_encoders_side_by_side(tuning, small_stream, towers):
    config = aper.AperConfig(tuning=tuning, schedule=Schedule(epochs=2, batch=8, lr=0.01))
    method = learned(aper.APER, config, small_stream, towers)
    pixels = torch.cat([pixels for pixels, _ in Loader(small_stream.tests[0], towers.prepare, towers.pixels)])
    with torch.no_grad():
        both = torch.cat([towers.image(pixels), method.image(pixels)], 1)
        means = []
        for task in small_stream.tasks:
            batches = list(Loader(task.train, towers.prepare, towers.pixels).ordered())
            x, y = torch.cat([pixels for pixels, _ in batches]), torch.cat([labels for _, labels in batches])
            rows = torch.cat([towers.image(x), method.image(x)], 1)
            means += [rows[y == c].mean(0) for c in task.classes]
        naive = towers.logit_scale * torch.nn.functional.cosine_similarity(
            both[:, None], torch.stack(means)[None], dim=2
        )
        got = method.scores(method.embed(pixels))
    torch.testing.assert_close(got, naive, rtol=1e-4, atol=1e-3)
    d = towers.dim
    assert (both[:, :d] - both[:, d:]).abs().max() > 1e-3  # the first task did adapt it


def test_full_tuning_of_the_first_session_has_its_own_rate_and_average(small_stream, towers):
    moved = []
    for tuning in (Full(lr=1e-7, average=None), Full(lr=1e-4, average=None), Full(lr=1e-4, average=0.5)):
        config = aper.AperConfig(tuning=tuning, schedule=Schedule(epochs=1, batch=8, lr=0.5))
        method = aper.APER(towers, config, seed=1)
        start = method.image.state_dict()
        method.learn(small_stream.tasks[0], Context(Seeds(1)))
        end = method.image.state_dict()
        moved.append(sum((end[name] - start[name]).double().norm().item() for name in start if name != "version"))
    assert 100 * moved[0] < moved[2] < moved[1]


def test_aper_adapts_once(small_stream, towers):
    config = aper.AperConfig(schedule=Schedule(epochs=1, batch=8, lr=0.01))
    method = aper.APER(towers, config, seed=1)
    method.learn(small_stream.tasks[0], Context(Seeds(1)))
    then = method.image.state_dict()
    method.learn(small_stream.tasks[1], Context(Seeds(1)))
    assert all(torch.equal(then[key], value) for key, value in method.image.state_dict().items())


def test_class_means_are_of_all_rows_however_they_come():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=rng) + 4, torch.arange(60) % 3
    means = ClassMeans.empty(5)
    for part in torch.arange(60).split(7):
        means = means.add(x[part], y[part])
    torch.testing.assert_close(means.means, torch.stack([x[y == c].mean(0) for c in range(3)]))
    assert means.counts.tolist() == [20, 20, 20]
    assert torch.equal(means.without(1).means, means.means[[0, 2]])
