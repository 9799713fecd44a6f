"""Processes side by side, with threads in their place: what each makes of its share, together, is what one makes of it all."""

from __future__ import annotations

import copy
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from cairn.data.loading import Loader
from cairn.errors import CairnError, ConfigError, Interrupted
from cairn.experiment import evaluator
from cairn.experiment.evaluator import Evaluator
from cairn.methods.catalogue import METHODS
from cairn.training.checkpoint import Checkpoint
from cairn.training.context import BESIDE, Context, SyncSchedule
from cairn.training.distributed import ALONE, ProcessLost, World
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.training.log import Log
from cairn.training.seeds import Seeds

LAUNCH = {
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


class Thread(World):
    """A thread that is process `rank`; what the processes say to one another lies in a table that all have."""

    def __init__(self, rank: int, number: int, table: list, barrier: threading.Barrier):
        super().__init__(number, rank)
        self.table, self.barrier = table, barrier

    def all_gather(self, value):
        self.table[self.rank] = copy.deepcopy(value)
        self.barrier.wait(120)
        values = list(self.table)
        self.barrier.wait(120)
        return values

    def broadcast_from_main(self, act):
        try:
            said = self.all_gather((True, act()) if self.is_main else None)[0]
        except CairnError:
            self.all_gather((False, None))
            raise
        if not said[0]:
            raise ProcessLost("the first one failed")
        return said[1]

    def _all_reduce(self, values, how):
        rows = torch.stack(self.all_gather(values))
        return rows.sum(0) if how == "SUM" else rows.amax(0)

    def broadcast_(self, tensors):
        for tensor, first in zip(tensors, self.all_gather([t.detach() for t in tensors])[0], strict=True):
            tensor.data.copy_(first)


def side_by_side(number, act):
    """What `act(world)` gives in each of so many. Where one fails, the others wait for it no longer."""
    table, barrier = [None] * number, threading.Barrier(number)

    def one(rank):
        try:
            return act(Thread(rank, number, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(one, rank) for rank in range(number)]
    errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # its own before those of the processes that lost it
    return [future.result() for future in futures]


class Items:
    """Correlated rows of numbers as images, and which of them were opened."""

    def __init__(self, number):
        rng = np.random.default_rng(0)
        self.values = (rng.normal(size=(number, 3)) @ [[1.0, 0.5, 0], [0, 1, 0.3], [0, 0, 0.2]]).astype(np.float32)
        self.labels, self.opened = np.arange(number) % 4, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.opened.append(index)
        return self.values[index]


def loader(items, batch=8, **options):
    return Loader(items, torch.from_numpy, lambda x: x, batch=batch, **options)


# what the launcher says


def test_a_launch_is_read_and_one_process_is_alone():
    assert World.launched({}) == World.launched({**LAUNCH, "WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    assert World.launched(LAUNCH) == World(4, 2, 2)
    alone = World()
    assert (alone.all_gather(3), alone.broadcast_from_main(lambda: 4), alone.all_reduce_max(1, 2), alone.is_main) == (
        [3],
        4,
        [1, 2],
        True,
    )
    with alone.connected("cuda:7"):
        assert alone.should_report(ConfigError("anything"))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, "accelerate launch: asked for several"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE 2"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS 8"),
        ({**LAUNCH, "RANK": "first"}, "RANK 'first': must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without LOCAL_RANK and MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_launch_that_is_none_is_refused_with_the_remedy(environment, says):
    with pytest.raises(ConfigError, match="use torchrun --nproc_per_node N") as caught:
        World.launched(environment)
    assert says in str(caught.value)


def test_accelerate_with_one_process_is_one_process():
    assert World.launched({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}) == ALONE


def test_a_device_of_one_process_is_refused_to_several():
    with pytest.raises(ConfigError, match="device 'cuda:1'"), World.launched(LAUNCH).connected("cuda:1"):
        pass


# shares of images


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_make_up_every_batch_and_each_item_is_kept_once(parts):
    items = Items(43)
    rng = [torch.Generator().manual_seed(0) for _ in range(parts + 1)]
    whole = [sorted(x[:, 0].tolist()) for x, _ in loader(items).epoch(rng[-1])]
    loaders = [loader(Items(43)) for _ in range(parts)]
    epochs = [list(next(own.epochs([rng[number]], share=(number, parts)))) for number, own in enumerate(loaders)]
    for batch, pieces in zip(whole, zip(*epochs, strict=True), strict=True):
        assert sorted(value for x, _ in pieces if len(x) for value in x[:, 0].tolist()) == batch
        sizes = [len(y) for _, y in pieces]
        assert max(sizes) - min(sizes) <= 1
    kept = np.stack([own._filled for own in loaders])
    assert kept.sum(0).max() == 1
    for number, own in enumerate(loaders):
        list(own.ordered(number, parts))
    kept = np.stack([own._filled for own in loaders])
    assert (kept.sum(0) == 1).all()


def test_a_part_without_rows_opens_nothing():
    items = Items(9)
    batches = list(next(loader(items).epochs([torch.Generator().manual_seed(1)], share=(3, 4))))
    assert [len(y) for _, y in batches] == [2, 0]
    assert len(items.opened) == 2


# training


def learned(number, optimizer="adamw", work=None, steps=None, rows=43):
    """Parameters, logged epochs and kept work of a stage, from each process."""

    def act(world):
        theta = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(2))]
        events, kept = [], []
        checkpoint = Checkpoint(seconds=1e9, steps=1 if steps else None, world=world)
        checkpoint.kept_by(lambda state: kept.append(copy.deepcopy(state)))
        checkpoint.begin(copy.deepcopy(work))
        schedule = Schedule(epochs=3, batch=8, lr=0.1, optimizer=optimizer, clip=0.5)

        def loss(x, y):
            return nn.functional.cross_entropy(x @ theta[0] + theta[1], y)

        fit(loss, theta, loader(Items(rows)), schedule, Context(Seeds(3), Log(keep=events.append), checkpoint))
        return [p.detach() for p in theta], events, kept

    return side_by_side(number, act) if number > 1 else [act(ALONE)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("number", [2, 5])
def test_a_stage_on_images_ends_where_that_of_one_process_does(number, optimizer):
    (alone,), several = learned(1, optimizer), learned(number, optimizer)
    for parameters, events, _ in several:
        torch.testing.assert_close(parameters, alone[0], atol=1e-6, rtol=1e-5)
        assert torch.equal(parameters[2], torch.ones(2))  # in no loss: not even weight decay
        assert all(torch.equal(a, b) for a, b in zip(parameters, several[0][0], strict=True))
        assert [(e["epoch"], e["rows"]) for e in events] == [(0, 43), (1, 43), (2, 43)]
        assert [e["loss"] for e in events] == pytest.approx([e["loss"] for e in alone[1]], rel=1e-5)


def test_a_process_without_rows_goes_along():
    """Nine rows in batches of eight: the second batch is one row, so three of four processes have none."""
    (alone,), several = learned(1, rows=9), learned(4, rows=9)
    for parameters, _, _ in several:
        torch.testing.assert_close(parameters, alone[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_a_stage_is_gone_on_with_by_another_number(before, after):
    (alone,), *_ = learned(1), None
    kept = learned(before, steps=True)[0][2]
    for work in (kept[0], kept[7], kept[-2]):
        for parameters, _, _ in learned(after, work=work):
            torch.testing.assert_close(parameters, alone[0], atol=1e-6, rtol=1e-5)


def test_batches_of_features_are_gone_through_by_each():
    class Rows:
        x, y = torch.from_numpy(Items(20).values), torch.from_numpy(Items(20).labels)

        def __len__(self):
            return 3

        def epochs(self, rngs, skip=0):
            return (
                islice(zip(self.x[p].split(8), self.y[p].split(8), strict=True), 0 if i else skip, None)
                for i, p in enumerate(torch.randperm(20, generator=rng) for rng in rngs)
            )

    def act(world):
        theta = nn.Parameter(torch.zeros(3, 4))

        def loss(x, y):
            return nn.functional.cross_entropy(x @ theta, y)

        fit(loss, [theta], Rows(), Schedule(epochs=2, lr=0.1), Context(Seeds(1), checkpoint=Checkpoint(world=world)))
        return theta.detach()

    alone = act(ALONE)
    assert all(torch.equal(found, alone) for found in side_by_side(3, act))


# passes


def passed(number, work=None):
    """Rows, images seen by each process and kept work of a pass."""

    def act(world):
        items, kept = Items(43), []
        checkpoint = Checkpoint(seconds=1e9, steps=1, world=world)
        checkpoint.kept_by(lambda state: kept.append(copy.deepcopy(state)))
        checkpoint.begin(copy.deepcopy(work))
        checkpoint.keep_features(torch.tensor([0, 7, 8, 23, 42]), 43)
        ctx = Context(Seeds(1), checkpoint=checkpoint)
        x, y = encode(loader(items), lambda x, _: x @ x.T[:, :1].sum(1), ctx, "X", embed=lambda x: x)
        every = torch.cat([pixels for pixels, _ in loader(Items(43)).ordered()])
        assert torch.equal(checkpoint.sampled, every[[0, 7, 8, 23, 42]])
        return x, y, sorted(items.opened), kept

    return side_by_side(number, act) if number > 1 else [act(ALONE)]


def test_features_that_were_asked_for_are_not_those_of_as_many_other_images():
    """Images without labels may be as many as those with: what is kept is of the task's images."""
    checkpoint = Checkpoint()
    checkpoint.keep_features(torch.tensor([0, 7, 8]), 43)
    ctx = Context(Seeds(1), checkpoint=checkpoint)
    for name, sign in (("X", 1), (f"{BESIDE}others", -1)):
        encode(loader(Items(43)), lambda x, _: x, ctx, name, embed=lambda x, sign=sign: sign * x)
    wanted = torch.cat([pixels for pixels, _ in loader(Items(43)).ordered()])[[0, 7, 8]]
    assert torch.equal(checkpoint.features_of(torch.tensor([0, 7, 8])), wanted)


@pytest.mark.parametrize("number", [2, 4, 7])
def test_a_pass_gives_every_process_all_rows_to_the_bit(number):
    (alone,), several = passed(1), passed(number)
    assert all(torch.equal(found[i], alone[i]) for found in several for i in (0, 1))
    assert sorted(index for found in several for index in found[2]) == list(range(43))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 1), (3, 2)])
def test_a_pass_is_gone_on_with_by_another_number(before, after):
    (alone,) = passed(1)
    for work in passed(before)[0][3]:
        several = passed(after, work)
        assert all(torch.equal(found[i], alone[i]) for found in several for i in (0, 1))
        opened = sum(len(found[2]) for found in several)
        assert opened == 43 - 8 * int(work["X"]["batches"]) or (opened == 0 and int(work["X"]["batches"]) == 6)


# evaluation


@pytest.mark.parametrize("name", ["simplecil", "spa"])
def test_scoring_is_shared_out_and_tells_the_same(towers, small_stream, name, monkeypatch):
    """Every figure, to the bit. Tasks have 7, 7 and 10 images in batches of 3: the last of four has no batch but in the last task."""
    entry = METHODS[name]
    method = entry.build(towers, entry.default_config(towers), seed=1)
    for task in small_stream.tasks:
        method.learn(task, Context(Seeds(1)))
    embed, turn = method.embed, threading.Lock()  # a tower is for one thread at a time
    monkeypatch.setattr(evaluator, "BATCH", 3)
    alone = Evaluator(small_stream, towers).after(2, method)

    def embed_in_turn(pixels):
        with turn:
            return embed(pixels)

    monkeypatch.setattr(method, "embed", embed_in_turn)

    def act(world):
        polls = []
        found = Evaluator(small_stream, towers, between=lambda: polls.append(1), world=world).after(2, method)
        return found, len(polls)

    for number in (2, 4):
        several = side_by_side(number, act)
        assert [found[0] for found in several] == [alone] * number
        assert len({found[1] for found in several}) == 1


# stopping


def test_all_stop_after_the_same_unit_whoever_was_asked():
    def act(world):
        checkpoint, kept = Checkpoint(seconds=1e9, world=world), []
        checkpoint.kept_by(lambda work: kept.append(int(work["x"]["done"])))
        checkpoint.begin()
        for done in range(100_000):
            if world.rank == 1 and done == 20:
                checkpoint.stop(signal.SIGTERM)
            try:
                checkpoint.step("x", lambda done=done: {"done": torch.tensor(done)})
            except Interrupted as stopped:
                return done, stopped.signal, kept[-1]
        return None

    found = side_by_side(3, act)
    assert len(set(found)) == 1
    done, number, kept = found[0]
    assert (number, kept) == (signal.SIGTERM, done)
    assert done >= 20


def test_the_clock_of_the_first_decides_when_all_keep():
    def act(world):
        seconds = 0.0 if world.is_main else 1e9
        checkpoint, kept = Checkpoint(seconds, world=world), []
        checkpoint.kept_by(lambda work: kept.append(work["x"]))
        for done in range(50):
            checkpoint.step("x", lambda done=done: done)
        return kept

    found = side_by_side(2, act)
    assert found[0] == found[1] != []


def test_meetings_are_seldom_where_units_are_short():
    asked = []

    class Counting(World):
        def all_reduce_max(self, *values):
            asked.append(values)
            return list(values)

    meetings = SyncSchedule(Counting(2, 0))
    for _ in range(20_000):
        meetings.ask(0, False)
    assert 1 < len(asked) < 40
    meetings.soon()
    assert meetings.ask(15, True) == (15, True)


def test_what_the_first_cannot_read_stops_the_others():
    def refused():
        raise ConfigError("damaged")

    def act(world):
        try:
            world.broadcast_from_main(refused)
        except CairnError as error:
            return type(error)
        return None

    assert side_by_side(2, act) == [ConfigError, ProcessLost]
