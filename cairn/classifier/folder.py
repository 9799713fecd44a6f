"""The folder of a learner: a manifest with its record, its tensors, and a card for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from cairn.classifier.card import card
from cairn.classifier.learned import Learned
from cairn.classifier.record import KEEP, LearnerRecord
from cairn.classifier.stored import restore_checked
from cairn.data.descriptions import Descriptions
from cairn.errors import ConfigError, ResultError, counted
from cairn.methods.catalogue import method_named
from cairn.methods.protocol import Method
from cairn.storage.archive import Archive
from cairn.storage.files import atomic_write
from cairn.storage.schema import validated
from cairn.storage.versions import versions
from cairn.towers.fingerprint import same_towers
from cairn.towers.preprocessing import decoded_side
from cairn.towers.protocol import Towers
from cairn.types import State

NAME, CARD = "learner", "CARD.md"


def require_savable(name: str) -> None:
    """Raises ConfigError for a method that keeps images: none are written."""
    if method_named(name).card.keeps == "images":
        raise ConfigError(f"method '{name}' keeps images, so it cannot be saved; take another of `cairn list`")


def record_of(
    name: str,
    method: Method,
    learned: Learned,
    towers: Towers,
    *,
    seed: int,
    templates: Sequence[str],
    descriptions: Descriptions | None,
    preprocess: Literal["crop", "squash"] | None,
    keep: int = KEEP,
) -> LearnerRecord:
    """The record of `method`, which is called `name` and was learned on `towers`; `keep` states of it are to stay."""
    record = {
        "method": name,
        "config": method.config.model_dump(mode="json"),
        "seed": int(seed),
        "templates": list(templates),
        "descriptions": None
        if descriptions is None
        else {n: list(d.sentences) for n, d in descriptions.classes.items()},
        "towers": {
            "name": towers.source,
            "fingerprint": towers.fingerprint,
            "precision": towers.precision,
            "preprocess": preprocess,
            "revision": towers.revision,
            **({"decode": "reduced"} if decoded_side(towers) else {}),  # whole is not said: earlier versions read it so
        },
        "keep": keep,
        "memory_bytes": method.memory_bytes,
        "bytes": sum(value.nbytes for value in method.state_dict().values()),
        "versions": versions(),
        **learned.to_record(),
    }
    return validated(LearnerRecord, record, "this learner")


def save_learner(
    folder: Path, record: LearnerRecord, method: Method, learned: Learned, keep: int | None = None
) -> None:
    """Whole or not at all: a learner that was there stays until this one is written and checked. The last `keep` stay, by
    default as many as the record says."""
    require_savable(record.method)
    Archive(folder, NAME).write(
        record.model_dump(mode="json", exclude_unset=True),
        {"method": method.state_dict(), **learned.to_parts()},
        record.keep if keep is None else keep,
    )
    _write_card(folder, record)


def _write_card(folder: Path, record: LearnerRecord) -> None:
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(card(record), encoding="utf-8")


def no_learner(folder: Path) -> ResultError:
    """The error to raise for a folder that holds none, or is not there."""
    return ResultError(f"'{folder}': no learner there; `cairn learn {folder} PICTURES` makes one")


def read_record(folder: Path) -> tuple[LearnerRecord, list[str]]:
    """What a folder says of its learner, without weights, and which newer states are damaged. Raises ResultError."""
    found = Archive(folder, NAME).read()
    if found is None:
        raise no_learner(folder)
    return validated(LearnerRecord, found.record, f"'{folder}': record of the learner"), found.damaged


def undo(folder: Path) -> LearnerRecord:
    """Put the state before the last change in the place of the newest: what it held is as it was, to the bit, and its history
    says besides that a change was undone. Called again, it goes one change further back.

    Weights are not needed. Raises ResultError where no earlier state is kept, and says why.
    """
    record, _ = read_record(folder)
    what = f"'{folder}': record of the state before"

    def amended(last: dict[str, Any], before: dict[str, Any]) -> dict[str, Any] | None:
        history, now = before["history"], last["history"]
        # Saved twice, or left by an undo that was cut off: the same state once more
        if now == history or (now[:-1] == history and now[-1].get("change") == "undone"):
            return None
        done = validated(LearnerRecord, last, f"'{folder}': record of the learner").history
        kinds = [entry.kind for entry in done[len(history) :] if entry.kind != "undone"]
        kind = kinds[-1] if kinds else done[-1].kind
        entry = {"date": str(date.today()), "images": 0, "change": "undone", "undone": kind}
        changed = before | {"history": [*history, entry], "keep": record.keep}
        return validated(LearnerRecord, changed, what).model_dump(mode="json", exclude_unset=True)

    if not Archive(folder, NAME).back(amended):
        raise ResultError(f"'{folder}': {_why_not(record)}")
    record, _ = read_record(folder)
    _write_card(folder, record)
    return record


def _why_not(record: LearnerRecord) -> str:
    """Why nothing can be undone."""
    last = next((entry for entry in reversed(record.history) if entry.kind != "undone"), None)
    if last is not None and last.kind == "forgotten":
        return "the last change forgot a class, and nothing of that is kept; learn its pictures again"
    if last is not None and last.kind == "unlearned":
        return "the last change took pictures out, and nothing of them is kept; learn them again"
    return (
        f"no earlier state is there ({record.keep} of them {'is' if record.keep == 1 else 'are'} kept, with the newest); "
        "`cairn learn --keep` keeps more from then on"
    )


@dataclass(frozen=True)
class StoredLearner:
    """What a folder holds. What only its towers can tell is checked by `require_towers` and `restore`."""

    folder: Path
    record: LearnerRecord
    config: BaseModel
    learned: Learned
    state: State
    notices: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> StoredLearner:
        """Raises ResultError for a folder that holds none or is damaged."""
        found = Archive(folder, NAME).read()
        if found is None:
            raise no_learner(folder)
        if not found.record:
            raise ResultError(f"'{folder}': kept by a run of an earlier version; run it again with --keep-learner")
        record = validated(LearnerRecord, found.record, f"'{folder}': record of the learner")
        entry, made_by = method_named(record.method), record.versions.get("cairn")
        settings = entry.completed(record.config)
        config = validated(entry.config, settings, f"'{folder}': settings of the learner", made_by)
        try:
            learned = Learned.of_record(record, found.parts)
        except ValueError as error:
            what = "the hashes of pictures" if record.label_sets is None else "hashes of pictures, or decisions on them"
            raise ResultError(f"'{folder}': {what}: {error}; restore the folder from a copy") from None
        if "method" not in found.parts:
            raise ResultError(f"'{folder}': holds no state of a method; learn again")
        notices = [f"{damaged}; the one before it was taken" for damaged in found.damaged]
        if learned.unhashed:
            notices.append(
                f"learned without hashes, by an earlier version or in a run: {counted(learned.unhashed, 'image')}, not known "
                "one by one; given again, they count twice"
            )
        return cls(folder, record, config, learned, found.parts["method"], tuple(notices))

    def require_towers(self, towers: Towers) -> None:
        """Raises ResultError for others than it was learned on."""
        if not same_towers(towers.fingerprint, held := self.record.towers.fingerprint):
            raise ResultError(
                f"'{self.folder}': learned on towers {held}, '{towers.name}' is {towers.fingerprint} today; give the weights "
                "and the tokenizer that it was learned on. What it learned holds for no others: to change them, learn its "
                "pictures again in another folder"
            )

    def restore(self, method: Method) -> Method:
        """A fresh method, with what was learned. Raises ResultError if the state does not fit it."""
        restore_checked(method, self.state, self.folder, len(self.record.classes))
        return method
