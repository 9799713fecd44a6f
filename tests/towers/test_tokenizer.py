"""What turns a text into tokens: missing, foreign, somebody's code; and that the fingerprint covers it."""

from __future__ import annotations

import json
import os
import pty
import select
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast

from cairn import IncrementalClassifier
from cairn.errors import ResultError, TowersError
from cairn.storage.archive import Archive
from cairn.towers.cached import CachedTowers
from cairn.towers.catalogue import load_towers
from cairn.towers.tokenizer import load_tokenizer, tokenizer_fingerprint

TEXTS = ("a photo of a striped red star.", "It's an aquarium_fish, 12 of them")


def edited(path: Path, change) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    change(stored)
    path.write_text(json.dumps(stored), encoding="utf-8")


def tokens(folder: Path) -> list[list[int]]:
    return [load_tokenizer(folder)(text, add_special_tokens=False).input_ids for text in TEXTS]


# --- missing and foreign ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["", "open_clip:"])
def test_a_folder_without_a_tokenizer_is_refused(copy, open_clip_copy, layout):
    folder = open_clip_copy if layout else copy
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        TowersError, match=r"tokenizer\.json is missing, or vocab\.json and merges\.txt in its place; copy"
    ):
        load_towers(f"{layout}{folder}", device="cpu")
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(TowersError, match=r"tokenizer\.json is missing, or merges\.txt in its place; copy"):
        load_towers(f"{layout}{folder}", device="cpu")


def five_words(tokenizer: dict) -> None:
    words = ["<unk>", "<|startoftext|>", "<|endoftext|>", "a", "photo"]
    tokenizer["model"] = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}
    tokenizer["added_tokens"] = []


def longer(tokenizer: dict) -> None:
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][0] | {"id": len(tokenizer["model"]["vocab"]), "content": "<x>"}
    )


def swapped_ends(tokenizer: dict) -> None:
    for entries in (tokenizer["added_tokens"], [tokenizer["model"]["vocab"]]):
        for entry in entries:
            if "<|startoftext|>" in entry:
                entry["<|startoftext|>"], entry["<|endoftext|>"] = entry["<|endoftext|>"], entry["<|startoftext|>"]
            elif entry.get("id") in (3, 4):
                entry["id"] = 7 - entry["id"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (five_words, "has 6 tokens with ids up to 5, the text tower a table of 784 rows"),
        (longer, "has 785 tokens with ids up to 784, the text tower a table of 784 rows"),
        (swapped_ends, "bos_token_id is 4 in the tokenizer, 3 in config.json"),
    ],
)
def test_the_tokenizer_of_another_model_is_refused(copy, change, says):
    edited(copy / "tokenizer.json", change)
    with pytest.raises(TowersError, match=says):
        load_towers(str(copy), device="cpu")


def test_a_tokenizer_without_an_end_is_refused(copy):
    (copy / "tokenizer_config.json").unlink()
    edited(copy / "tokenizer.json", lambda t: t.update(added_tokens=[a for a in t["added_tokens"] if a["id"] != 4]))
    edited(
        copy / "tokenizer.json",
        lambda t: t["model"]["vocab"].update({"other": t["model"]["vocab"].pop("<|endoftext|>")}),
    )
    edited(copy / "tokenizer.json", lambda t: t.update(post_processor=None))
    with pytest.raises(TowersError, match="has no eos_token"):
        load_towers(str(copy), device="cpu")


def test_a_damaged_tokenizer_is_one_line(copy):
    for damage in ("{", "[]", '{"model": 3}'):
        (copy / "tokenizer.json").write_text(damage)
        with pytest.raises(TowersError, match="not a tokenizer") as caught:
            load_towers(str(copy), device="cpu")
        assert "\n" not in str(caught.value)


def test_a_table_rounded_up_and_ids_that_say_nothing_are_taken(copy, towers):
    """Old configs carry the ids 0 and 2 whatever the tokenizer is; a longer table has rows that no token uses."""
    edited(copy / "config.json", lambda c: c["text_config"].update(bos_token_id=0, eos_token_id=2))
    assert load_towers(str(copy), device="cpu").eos == towers.eos


def test_the_tokens_are_those_of_the_file(copy, towers):
    expected = [towers.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert tokens(copy) == expected
    (copy / "tokenizer_config.json").unlink()  # CLIP's own special tokens then
    assert (load_tokenizer(copy).bos_token_id, load_tokenizer(copy).eos_token_id) == (towers.bos, towers.eos)


def test_vocabulary_and_merges_are_clips_own_tokenizer(copy):
    expected = tokens(copy)
    stored = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (copy / "vocab.json").write_text(json.dumps(stored["vocab"]), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stored["merges"]]
    (copy / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (copy / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(copy)
    assert isinstance(tokenizer, CLIPTokenizerFast)
    assert tokens(copy) == expected  # tiny's rules are CLIP's


# --- the fingerprint ----------------------------------------------------------------------------------------------------


def lower_case_off(tokenizer: dict) -> None:
    tokenizer["normalizer"]["normalizers"].pop()


def other_split(tokenizer: dict) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"].pop(0)


def one_merge_less(tokenizer: dict) -> None:
    tokenizer["model"]["merges"].pop()


def two_words_swapped(tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_the_fingerprint_covers_what_turns_a_text_into_tokens(copy, towers):
    weights, tokenizer = towers.fingerprint.split("-")
    whole = (copy / "tokenizer.json").read_text(encoding="utf-8")
    seen = {tokenizer}
    for change in (lower_case_off, other_split, one_merge_less, two_words_swapped):
        (copy / "tokenizer.json").write_text(whole, encoding="utf-8")
        edited(copy / "tokenizer.json", change)
        changed = load_towers(str(copy), device="cpu").fingerprint.split("-")
        assert changed[0] == weights
        seen.add(changed[1])
    assert len(seen) == 5


def test_the_fingerprint_is_that_of_the_tokens_not_of_the_file(copy, towers):
    """Saved again, with padding and another length, or as older versions wrote it: the same tokens, the same hash."""
    expected = tokenizer_fingerprint(towers.tokenizer)
    edited(copy / "tokenizer_config.json", lambda c: c.update(model_max_length=7, pad_token="<unk>"))
    edited(
        copy / "tokenizer.json", lambda t: t["model"].update(merges=[" ".join(pair) for pair in t["model"]["merges"]])
    )
    edited(copy / "tokenizer.json", lambda t: t["model"].pop("ignore_merges", None))
    assert tokenizer_fingerprint(load_tokenizer(copy)) == expected
    load_tokenizer(copy).save_pretrained(copy / "again")
    assert tokenizer_fingerprint(load_tokenizer(copy / "again")) == expected


def test_the_weights_part_is_what_it_was_before(shared, towers):
    """Stored results, learners and feature stores name their towers by it."""
    assert towers.fingerprint.startswith("d89ade1f41d3ac2a-")
    assert load_towers(str(shared / "mini-clip"), device="cpu").fingerprint.startswith("efe95cddeecc1de9-")


def test_embeddings_of_images_are_kept_whatever_the_tokenizer(towers):
    """A feature store that was filled before tokenizers were covered stays in use."""
    assert CachedTowers(towers, None)._maker == f"{towers.fingerprint.split('-')[0]}-float32-cpu"


@pytest.fixture
def learner(tmp_path, copy) -> Path:
    held = IncrementalClassifier("simplecil", str(copy), device="cpu")
    held.partial_fit([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)], ["bear", "tea cup"])
    held.save(tmp_path / "x.cairn")
    return tmp_path / "x.cairn"


def test_a_learner_is_not_loaded_on_another_tokenizer(learner, copy):
    edited(copy / "tokenizer.json", two_words_swapped)
    with pytest.raises(ResultError, match="give the weights and the tokenizer that it was learned on"):
        IncrementalClassifier.load(learner, device="cpu")


def test_a_learner_of_before_tokenizers_were_covered_still_loads(learner, copy):
    archive = Archive(learner, "learner")
    held = archive.read()
    held.record["towers"]["fingerprint"] = held.record["towers"]["fingerprint"].split("-")[0]
    archive.write(held.record, held.parts)
    assert list(IncrementalClassifier.load(learner, device="cpu").classes_) == ["bear", "tea cup"]


# --- code from a stranger -----------------------------------------------------------------------------------------------


def answered_yes(code: str, seconds: float = 120) -> str:
    """What a Python process says that runs on a terminal of its own, where 'y' is the answer to whatever it asks."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    said, end = b"", time.monotonic() + seconds
    try:
        os.write(terminal, b"y\n" * 20)
        while time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    part = os.read(terminal, 4096)
                except OSError:  # Linux's way to say that the other end was closed
                    break
                if not part:
                    break
                said += part
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return said.decode(errors="replace")


@pytest.mark.parametrize("layout", ["", "open_clip:"])
def test_code_of_a_checkpoint_is_never_run_whatever_is_answered(copy, open_clip_copy, tmp_path, layout):
    folder, ran = (open_clip_copy if layout else copy), tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Theirs: pass\n")
    own = {
        "AutoConfig": "theirs.Theirs",
        "AutoModel": "theirs.Theirs",
        "AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"],
        "AutoProcessor": "theirs.Theirs",
        "AutoImageProcessor": "theirs.Theirs",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps({"model_type": "theirs"}))
        edited(folder / name, lambda stored: stored.update(auto_map=own))
    edited(folder / "tokenizer_config.json", lambda stored: stored.update(tokenizer_class="Theirs"))
    code = (
        f"from cairn.towers.catalogue import load_towers\n"
        f"print('fingerprint', load_towers({f'{layout}{folder}'!r}, device='cpu').fingerprint)\n"
    )
    said = answered_yes(code)
    assert not ran.exists()
    assert "fingerprint" in said, said
    assert "[y/N]" not in said


def test_the_class_is_ours_whatever_the_files_name(copy):
    edited(copy / "tokenizer_config.json", lambda stored: stored.update(tokenizer_class="BertTokenizer"))
    assert type(load_tokenizer(copy)) is PreTrainedTokenizerFast
