"""RECO: the layer against torch's own, what each side takes, what is searched in training, and other methods' features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teaching import rows, taught
from torch import nn
from torch.nn.functional import cross_entropy

from cairn.config import with_settings
from cairn.data.embeddings import save_features
from cairn.errors import ConfigError, UnknownName
from cairn.maths.similarity import unit
from cairn.methods import reco
from cairn.methods.catalogue import METHODS
from cairn.methods.reco import FusionLayer
from cairn.training.context import Context
from cairn.training.log import Log
from cairn.training.seeds import Seeds


def build(towers, *assignments, seed=1):
    entry = METHODS["reco"]
    config = with_settings(entry.default_config(towers), ["schedule.epochs=2", "schedule.batch=16", "neighbours=3"])
    return entry.build(towers, with_settings(config, assignments), seed=seed)


def learned(towers, tasks, *assignments):
    return taught(build(towers, *assignments), tasks)


def trained_layer(d=8, heads=2, seed=0):
    """One whose matrices are all away from where they start."""
    rng = torch.Generator().manual_seed(seed)
    layer = FusionLayer(d, heads, rng)
    for weight in layer.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=rng) * torch.logspace(0, -1, d)
    return layer


def correlated(n, d=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return unit(torch.randn(n, d, generator=rng) @ torch.randn(d, d, generator=rng) * torch.logspace(0, -1, d) + 0.3)


# --- the layer --------------------------------------------------------------------------------------------------------


def test_the_layer_is_what_torch_s_adds_to_its_first_token():
    layer, d = trained_layer(), 8
    theirs = nn.TransformerEncoderLayer(d, 2, d, 0.0, "gelu", batch_first=True, norm_first=True, bias=False).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(layer.qkv)
        theirs.self_attn.out_proj.weight.copy_(layer.O)
        theirs.linear1.weight.copy_(layer.M1)
        theirs.linear2.weight.copy_(layer.M2)
        theirs.norm1.weight.copy_(layer.gains[0])
        theirs.norm2.weight.copy_(layer.gains[1])
    query, held = correlated(5, seed=1), correlated(7, seed=2)
    numbers = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(3))
    present = torch.rand(5, 4, generator=torch.Generator().manual_seed(4)) > 0.4
    first = d**0.5 * query + layer.kinds[0]
    tokens = torch.cat([first[:, None], d**0.5 * held[numbers] + layer.kinds[1]], 1)
    absent = torch.cat([torch.zeros(5, 1, dtype=torch.bool), ~present], 1)
    expected = theirs(tokens, src_key_padding_mask=absent)[:, 0] - first
    found = layer(query, held, numbers, present)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.1
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(layer(query, held, numbers[:, order], present[:, order]), found, rtol=1e-4, atol=1e-5)


def test_at_first_the_layer_adds_nothing_and_heads_divide_the_width():
    layer = FusionLayer(8, 2, torch.Generator().manual_seed(0))
    none = torch.zeros(5, 0)
    added = layer(correlated(5), correlated(7), none.long(), none.bool())
    assert torch.equal(added, torch.zeros(5, 8))
    assert (trained_layer()(correlated(5), correlated(7), none.long(), none.bool())).abs().max() > 0.1
    with pytest.raises(ConfigError, match=r"fusion\.heads=3: must divide the width of the embeddings, 8"):
        FusionLayer(8, 3, torch.Generator())


# --- what is refined --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", ["both", "text", "image", "mean"])
def test_untrained_it_is_zero_shot(compare, flat, stream):
    method = learned(flat, stream.tasks, "schedule.epochs=0", f"compare={compare}")
    x = rows(stream.tests[0])
    expected = flat.logit_scale * unit(x) @ method.anchors.T
    if compare == "text":
        assert torch.equal(method.scores(x), flat.logit_scale * unit(x) @ unit(method.anchors).T)
    torch.testing.assert_close(method.scores(x), expected, rtol=1e-5, atol=1e-5)


def naive_sides(method, x, fused, number=3):
    """v^ and t^ one by one: images take the texts of like images, texts the images of like texts."""
    T, V, y = method.anchors, method.exemplars.rows, method.exemplars.labels
    images, texts = [], []
    for v in unit(x):
        nearest = sorted(range(len(V)), key=lambda j: -float(v @ V[j]))[:number]
        images.append(fused("image", v, torch.stack([T[y[j]] for j in nearest])))
    for t in T:
        nearest = sorted(range(len(V)), key=lambda j: (-float(t @ T[y[j]]), -float(t @ V[j])))[:number]
        texts.append(fused("text", t, torch.stack([V[j] for j in nearest])))
    return torch.stack(images), torch.stack(texts)


@pytest.mark.parametrize("fusion", ["average", "transformer"])
def test_scores_are_the_written_ones(fusion, flat, stream):
    fast = ("schedule.lr=0.01", f"fusion={fusion}")
    method, x, s = learned(flat, stream.tasks, *fast), rows(stream.tests[1])[:5], flat.logit_scale

    def fused(side, query, values):
        if fusion == "average":
            return unit((0.75 * query + 0.25 * values.mean(0))[None])[0]
        every = torch.arange(len(values))[None]
        return unit(query[None] + method.layers[side](query[None], values, every, every >= 0))[0].detach()

    v, T = unit(x), method.anchors
    images, texts = naive_sides(method, x, fused)
    expected = {"both": images @ texts.T, "text": v @ texts.T, "image": images @ T.T}
    expected["mean"] = sum(expected.values()) / 3
    assert (expected["both"] - v @ T.T).abs().max() > 5e-3
    for compare, cosines in expected.items():
        again = build(flat, *fast, f"compare={compare}")
        again.load_state_dict(method.state_dict())
        torch.testing.assert_close(again.scores(x), s * cosines, rtol=1e-3, atol=1e-3)


def test_in_training_a_row_does_not_find_itself_and_the_loss_is_the_written_one(flat, stream, monkeypatch):
    seen = {}

    def spy(loss, parameters, batches, *_):
        i, y = next(batches.epoch(torch.Generator().manual_seed(0)))
        seen.update(loss=loss, i=i[:, 0], y=y, batches=batches, trained=parameters)

    method = learned(flat, stream.tasks[:1], "schedule.lr=0.01", "alignment=0.5", "exemplars=4")
    before = method.exemplars
    monkeypatch.setattr(reco, "fit", spy)
    method.learn(stream.tasks[1], Context(Seeds(1)))
    V = torch.cat([unit(rows(stream.tasks[1].train)), before.rows])
    y = torch.cat([torch.as_tensor(stream.tasks[1].train.labels), before.labels])
    assert torch.equal(seen["batches"].labels, y)
    assert before.sizes.tolist() == [4, 4]
    T, s = method.anchors, flat.logit_scale

    def refined(side, query, values):
        every = torch.arange(len(values))[None]
        return unit(query[None] + method.layers[side](query[None], values, every, every >= 0))[0]

    images, texts = [], []
    for i in seen["i"].tolist():
        others = sorted((j for j in range(len(V)) if j != i), key=lambda j, i=i: -float(V[i] @ V[j]))[:3]
        images.append(refined("image", V[i], T[y[others]]))
    for t in T:
        nearest = sorted(range(len(V)), key=lambda j, t=t: (-float(t @ T[y[j]]), -float(t @ V[j])))[:3]
        texts.append(refined("text", t, V[nearest]))
    (v, own), (image, text) = (V[seen["i"]], seen["y"]), (torch.stack(images), torch.stack(texts))
    apart = cross_entropy(s * image @ T.T, own) + cross_entropy(s * v @ text.T, own)
    expected = cross_entropy(s * image @ text.T, own) + 0.5 * apart
    torch.testing.assert_close(seen["loss"](seen["i"][:, None], own), expected, rtol=1e-4, atol=1e-4)
    assert len(seen["trained"]) == 12


def test_a_neighbour_below_the_floor_does_not_count(flat, stream):
    x = rows(stream.tests[0])
    none = learned(flat, stream.tasks, "fusion=average", "compare=image", "floor=1")
    torch.testing.assert_close(none.scores(x), flat.logit_scale * unit(x) @ none.anchors.T)
    assert (
        learned(flat, stream.tasks, "fusion=average", "compare=image").scores(x) - none.scores(x)
    ).abs().max() > 1e-2


def test_trained_on_the_first_task_alone_the_layers_stand_still(flat, stream):
    moved = []
    for train in ("first", "seen"):
        method = learned(flat, stream.tasks[:1], f"train={train}", "schedule.lr=0.01")
        before = {name: value.clone() for name, value in method.layers.state_dict().items()}
        method.learn(stream.tasks[1], Context(Seeds(1)))
        moved.append(any(not torch.equal(value, before[name]) for name, value in method.layers.state_dict().items()))
    assert moved == [False, True]


def test_it_learns_to_tell_classes_better_than_texts_alone(flat, stream):
    x = torch.cat([rows(test) for test in stream.tests])
    x = x + 1.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    truth = torch.cat([torch.as_tensor(test.labels) for test in stream.tests])
    losses = [
        cross_entropy(learned(flat, stream.tasks, *some).scores(x), truth).item()
        for some in (("schedule.epochs=0",), ("schedule.epochs=4", "schedule.lr=1e-3"))
    ]
    assert losses[1] < 0.9 * losses[0]


# --- another memory, another method -----------------------------------------------------------------------------------


def outside(path, text=True, d=16, copy=None):
    rng = np.random.default_rng(5)
    values = rng.normal(size=(9, d)).astype(np.float32)
    if copy is not None:
        values[:2] = copy
    save_features(
        path,
        train_features=values,
        train_labels=np.repeat(np.arange(3), 3),
        test_features=values[:3],
        test_labels=np.arange(3),
        class_names=["a", "b", "c"],
        text_features=rng.normal(size=(3, d)).astype(np.float32) if text else None,
    )
    return str(path)


def test_a_features_file_is_searched_beside_the_exemplars_and_duplicates_are_told(flat, stream, tmp_path):
    first = rows(stream.tasks[0].train)
    file, notices = outside(tmp_path / "more.safetensors", copy=first[:2].numpy()), []
    method = build(flat, f"memory={file}", "fusion=average", "compare=image", "neighbours=30", "exemplars=5")
    method.learn(stream.tasks[0], Context(Seeds(1), log=Log(keep=notices.append)))
    (told,) = [event["text"] for event in notices if event["event"] == "notice"]
    assert told == f"memory={file}: it holds 2 of the {len(first)} images of this task, or as good as"
    U = torch.cat([method.anchors, method.outside_texts])
    shares = torch.tensor([5, 5, 3, 3, 3]) / 19
    v, x = unit(rows(stream.tests[0])), rows(stream.tests[0])
    expected = flat.logit_scale * unit(0.75 * v + 0.25 * shares @ U) @ method.anchors.T
    torch.testing.assert_close(method.scores(x), expected, rtol=1e-4, atol=1e-4)
    assert method.memory_bytes == 10 * 16 * 4 + 2 * 8


def test_a_memory_that_does_not_fit_is_one_line(flat, tmp_path):
    with pytest.raises(ConfigError, match="its rows have 4 numbers, the towers' embeddings 16"):
        build(flat, f"memory={outside(tmp_path / 'narrow.safetensors', d=4)}")
    with pytest.raises(ConfigError, match="has no text_features"):
        build(flat, f"memory={outside(tmp_path / 'bare.safetensors', text=False)}")


def test_around_a_method_its_embeddings_and_class_vectors_are_refined(flat, stream):
    x = torch.cat([rows(test) for test in stream.tests])
    quick = ("stage1.schedule.epochs: 1", "stage2.schedule.epochs: 1")
    for base, given in (("simplecil", ""), ("dmc", ", ".join(quick)), ("lda", "")):
        entry, method = (
            METHODS[base],
            learned(flat, stream.tasks, f"base={base}", f"base_settings={{{given}}}", "schedule.epochs=0"),
        )
        plain = entry.build(
            flat,
            with_settings(entry.default_config(flat), [part.replace(": ", "=") for part in quick if given]),
            seed=1,
        )
        for task in stream.tasks:
            plain.learn(task, Context(Seeds(1)))
        with torch.no_grad():
            assert torch.equal(method.embed(x), plain.embed(x))
            z = unit(plain.embed(x))
        W = plain.class_matrix.detach() if base != "lda" else method.anchors  # which compares with no vectors
        torch.testing.assert_close(
            method.scores(method.embed(x).detach()), flat.logit_scale * z @ W.T, rtol=1e-4, atol=1e-3
        )
        assert method.encoder == plain.encoder
        assert method.memory_bytes == plain.memory_bytes + method.exemplars.bytes
        again = build(flat, f"base={base}", f"base_settings={{{given}}}")
        again.load_state_dict(method.state_dict())
        assert torch.equal(again.scores(x), method.scores(x))
        kept = method.scores(x)
        method.forget(1)
        assert method.scores(x).shape == (len(x), kept.shape[1] - 1)


def test_a_base_whose_encoder_moves_is_told(flat, stream):
    notices = []
    method = build(flat, "base=dmc", "base_settings={stage1.schedule.epochs: 1, stage2.schedule.epochs: 1}")
    for task in stream.tasks[:2]:
        method.learn(task, Context(Seeds(1), log=Log(keep=notices.append)))
    assert [event["task"] for event in notices if "encoder has moved" in event.get("text", "")] == [1]


def test_a_base_that_will_not_do_is_one_line(flat):
    for base in ("reco", "joint"):
        with pytest.raises(ConfigError, match=f"base={base}: must be another method"):
            build(flat, f"base={base}")
    with pytest.raises(UnknownName):
        build(flat, "base=dcm")
    with pytest.raises(ConfigError, match="there is no base"):
        build(flat, "base_settings={ridge: 3.0}")
