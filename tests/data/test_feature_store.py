"""Sets of rows on disk: found by image, whole or not at all, within a limit."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cairn.data.feature_store import FeatureStore, image_ids
from cairn.errors import CairnError

ABOUT = {"data": "made", "towers": "none"}


class Numbers:
    """Images that are their number."""

    def __init__(self, *numbers):
        self.numbers, self.labels = numbers, np.zeros(len(numbers), dtype=np.int64)

    def __len__(self):
        return len(self.numbers)

    def identity(self, index):
        return str(self.numbers[index]).encode()


class Tower:
    """Row i of what was asked is (number, number + 1, ...); counts what it computes."""

    def __init__(self, batch=3, width=4):
        self.batch, self.width, self.seen = batch, width, []

    def ask(self, store, *numbers, kind="image", maker="tower"):
        def computed(rows):
            for start in range(0, len(rows), self.batch):
                part = np.array([numbers[i] for i in rows[start : start + self.batch]], dtype=np.float32)
                self.seen += part.astype(int).tolist()
                image = part[:, None] + np.arange(self.width, dtype=np.float32)
                yield image, None if kind == "image" else np.stack([image + 0.1, image + 0.2], 1)

        return store.rows(maker, kind, image_ids(Numbers(*numbers)), computed, ABOUT)


@pytest.fixture
def store(tmp_path):
    return lambda **options: FeatureStore(tmp_path / "cache", **options)


def files(store):
    return sorted(store.folder.rglob("*.safetensors"))


def everything(rows):
    return np.arange(len(rows.which))


def test_rows_are_computed_once_and_found_in_any_order(store):
    tower = Tower()
    first = tower.ask(store(), *range(8))
    assert tower.seen == list(range(8))
    assert first.found == 0
    assert first.image(everything(first))[:, 0].tolist() == list(range(8))
    again = tower.ask(store(), 6, 2, 4)
    assert tower.seen == list(range(8))
    assert again.found == 3
    assert again.image(np.array([2, 0]))[:, 0].tolist() == [4, 6]


def test_what_is_missing_alone_is_computed(store):
    tower = Tower()
    tower.ask(store(), 0, 1, 2)
    tower.ask(store(), 7, 8)
    rows = tower.ask(store(), 9, 8, 3, 1, 9, 0)  # one of them twice
    assert tower.seen == [0, 1, 2, 7, 8, 9, 3]
    assert rows.found == 3
    assert rows.image(everything(rows))[:, 1].tolist() == [10, 9, 4, 2, 10, 1]


def test_patches_lie_beside_embeddings_which_serve_whoever_asks_for_those_alone(store):
    tower = Tower()
    rows = tower.ask(store(), 0, 1, 2, 3, kind="value")
    assert rows.patches(np.array([2])).tolist() == pytest.approx(
        np.array([[[2.1, 3.1, 4.1, 5.1], [2.2, 3.2, 4.2, 5.2]]])
    )
    assert tower.ask(store(), 3, 0).found == 2
    assert tower.ask(store(), 3, 0, kind="native").found == 0  # another attention is another question
    assert tower.ask(store(), 3, 0, maker="other").found == 0


def test_half_precision_is_for_patches_and_by_choice(store):
    tower = Tower()
    full, half = (tower.ask(store(patches=p), 0, 1, kind="value") for p in ("float32", "float16"))
    assert (full.patches(everything(full)).dtype, half.patches(everything(half)).dtype) == (np.float32, np.float16)
    assert half.image(everything(half)).dtype == np.float32
    assert half.found == 0  # full precision was there and is not mixed in
    np.testing.assert_allclose(half.patches(everything(half)), full.patches(everything(full)), rtol=1e-3)


def test_a_file_is_safetensors(store):
    Tower().ask(place := store(), *range(5), kind="value")
    (file,) = files(place)
    held = load_file(file)
    assert {key: value.shape for key, value in held.items()} == {"ids": (5, 16), "image": (5, 4), "patches": (5, 2, 4)}
    assert held["image"][:, 0].tolist() == list(range(5))


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def grown(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def scribbled(path):
    path.write_bytes(b"x" * path.stat().st_size)


def other_shape(path):
    path.write_bytes(path.read_bytes().replace(b"[5, 4]", b"[4, 5]"))


def other_images(path):
    held = load_file(path)
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    held["ids"][0] = 0
    save_file(held, path, about)


def other_format(path):
    path.write_bytes(path.read_bytes().replace(b"cairn features 1", b"cairn features 0"))


def no_tensor(path):
    path.write_bytes(path.read_bytes().replace(b'"dtype": "F32"', b'"dtype": "F99"'))


@pytest.mark.parametrize(
    "damage", [truncated, grown, empty, scribbled, other_shape, other_images, other_format, no_tensor]
)
def test_a_damaged_file_is_computed_again_and_never_trusted(store, damage):
    tower = Tower()
    tower.ask(store(), *range(5))
    (file,) = files(store())
    sound = file.read_bytes()
    damage(file)
    assert file.read_bytes() != sound
    rows = tower.ask(store(), *range(5))
    assert rows.found == 0
    assert rows.image(everything(rows))[:, 0].tolist() == list(range(5))
    assert file.read_bytes() == sound


def test_a_writer_that_stops_leaves_nothing(store):
    def computed(rows):
        yield np.zeros((2, 4), dtype=np.float32), None
        raise KeyboardInterrupt

    place = store()
    with pytest.raises(KeyboardInterrupt):
        place.rows("tower", "image", image_ids(Numbers(*range(5))), computed, ABOUT)
    assert not [path for path in place.folder.rglob("*") if path.is_file()]


def test_two_writers_of_one_set_both_have_sound_rows(store):
    others = []

    def computed(rows):  # while one computes, the other writes the same set, and is done first
        others.append(Tower().ask(store(), *range(5)))
        yield np.repeat(np.arange(5, dtype=np.float32)[:, None], 4, 1) + np.arange(4, dtype=np.float32), None

    mine = store().rows("tower", "image", image_ids(Numbers(*range(5))), computed, ABOUT)
    for rows in (mine, *others, Tower().ask(store(), *range(5))):
        assert rows.image(everything(rows))[:, 0].tolist() == list(range(5))
    assert len(files(store())) == 1


def test_what_was_used_longest_ago_goes_first_and_mapped_rows_stay(store):
    tower = Tower()
    old = tower.ask(store(), 0, 1)
    (oldest,) = files(store())
    tower.ask(store(), 2, 3)
    (second,) = set(files(store())) - {oldest}
    size = oldest.stat().st_size
    os.utime(oldest, (1e9, 1e9))
    os.utime(second, (1.1e9, 1.1e9))
    tower.ask(store(), 1)  # used again
    assert oldest.stat().st_mtime > time.time() - 60
    tower.ask(store(limit=2 * size + size // 2), 4, 5)
    assert oldest.exists()
    assert not second.exists()
    tower.ask(store(limit=size), 6, 7)
    assert len(files(store())) == 1
    assert old.image(np.array([1]))[0, 0] == 1


def test_a_set_beyond_the_limit_serves_this_time_and_is_not_kept(store):
    rows = Tower().ask(place := store(limit=100), *range(50))
    assert rows.image(np.array([49]))[0, 0] == 49
    assert not [path for path in place.folder.rglob("*") if path.is_file()]


def test_unfinished_files_of_the_day_before_are_removed(store):
    Tower().ask(place := store(), 0)
    (held,) = files(place)
    fresh, stale = held.with_name("a.part"), held.with_name("b.part")
    for path in (fresh, stale):
        path.write_bytes(b"half")
    os.utime(stale, (1e9, 1e9))
    place.listed()
    assert fresh.exists()
    assert not stale.exists()


def test_the_listing_sums_up_and_clearing_touches_nothing_else(store):
    place = store()
    Tower().ask(place, 0, 1)
    Tower().ask(place, 2)
    Tower().ask(place, 5, kind="value")
    foreign = place.folder / "features" / "org" / "model" / "model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"weights")
    listed = {entry.kind: entry for entry in place.listed()}
    assert {kind: (entry.data, entry.rows) for kind, entry in listed.items()} == {
        "image": ("made", 3),
        "value": ("made", 1),
    }
    assert sum(entry.bytes for entry in listed.values()) == place.clear()
    assert [path for path in place.folder.rglob("*") if path.is_file()] == [foreign]
    assert place.listed() == []


def test_where_and_how_much_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FeatureStore.configured({}).folder == tmp_path / ".cache" / "cairn"
    assert FeatureStore.configured({"XDG_CACHE_HOME": "/x"}).folder.as_posix() == "/x/cairn"
    chosen = FeatureStore.configured({"CAIRN_CACHE": "/y", "XDG_CACHE_HOME": "/x", "CAIRN_CACHE_BYTES": "7"})
    assert (chosen.folder.as_posix(), chosen.limit, chosen.patches) == ("/y", 7, "float32")
    assert FeatureStore.configured({}).limit == 20 * 10**9
    for name, value in (("CAIRN_CACHE_BYTES", "20GB"), ("CAIRN_CACHE_PATCHES", "int8")):
        with pytest.raises(CairnError, match=f"{name} '{value}': must be"):
            FeatureStore.configured({name: value})


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        CairnError, match=r"(Not a directory|File exists); set CAIRN_CACHE to another folder, or"
    ) as caught:
        Tower().ask(FeatureStore(tmp_path / "cache"), 0)
    assert "\n" not in str(caught.value)
