"""The table of methods: one row each, and nothing else to register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cairn.errors import UnknownName
from cairn.methods import dmc, dmc_ot, finetune, joint, simplecil, spa, zero_shot
from cairn.towers.protocol import Towers


@dataclass(frozen=True)
class Entry:
    """What a method declares: `cairn list` and `cairn explain` show it, a run holds the method to it.

    `trains` is what is trained, `keeps` what remains of old classes: `nothing`, `means`, `gaussians`, `second-order`
    (sums over all classes together), `generators`, `exemplars` (embeddings of single images) or `images`. A method that
    keeps one of the last two is not exemplar-free. `bytes` is the size of what is kept with default settings, in an
    expression of k classes, d numbers per embedding, n images learned from and i bytes of an image.

    `text` says that class texts are used, `needs_text` that it does not work without; `descriptions` that sentences
    about classes are used where there are any; `moves` that the image encoder is trained, once or in every task.
    """

    name: str
    title: str
    build: Callable[..., Any]
    config: type[BaseModel]
    source: str
    stages: tuple[str, ...]
    trains: str
    keeps: str
    bytes: str = ""
    text: bool = False
    needs_text: bool = False
    descriptions: bool = False
    moves: bool = False
    citation: str = ""

    @property
    def exemplar_free(self) -> bool:
        return self.keeps not in ("exemplars", "images")

    def default_config(self, towers: Towers) -> BaseModel:
        """The method's defaults; on precomputed embeddings those of its embedding form, if it has one."""
        if not towers.has_images and hasattr(self.config, "embedding"):
            return self.config.embedding()
        return self.config()


METHODS = {
    entry.name: entry
    for entry in (
        Entry(
            "zero-shot", "Zero-shot CLIP", zero_shot.ZeroShot, zero_shot.Config,
            "Radford et al. 2021", ("class texts from templates",), "nothing", "nothing", "0", text=True, needs_text=True,
            citation="Radford et al. Learning Transferable Visual Models From Natural Language Supervision. ICML 2021.",
        ),
        Entry(
            "simplecil", "SimpleCIL: class means", simplecil.SimpleCIL, simplecil.Config,
            "Zhou et al. 2023", ("mean embedding per class",), "nothing", "means", "k * (4 * d + 8)",
            citation="Zhou et al. Revisiting Class-Incremental Learning with Pre-Trained Models. arXiv 2303.07338.",
        ),
        Entry(
            "finetune", "Fine-tuning without memory (lower bound)", finetune.FineTune, finetune.Config,
            "the field's lower bound", ("stage 1: vision against class texts",), "vision", "nothing", "0", text=True, moves=True,
            citation="The plain sequential fine-tuning baseline of the class-incremental literature.",
        ),
        Entry(
            "joint", "Joint training (upper bound)", joint.Joint, joint.Config,
            "the field's upper bound", ("stage 1 on all images so far", "stage 2 on all images so far"),
            "vision, then text", "images", "n * i", text=True, moves=True,
            citation="The joint-training bound of the class-incremental literature.",
        ),
        Entry(
            "dmc", "DMC: decoupled stages, Gaussian replay", dmc.DMC, dmc.Config,
            "arXiv 2511.10974",
            (
                "stage 1: vision moves, class texts are the frozen anchor",
                "statistics: a Gaussian per class from one pass of the new encoder",
                "stage 2: text moves, vision is frozen; old classes are drawn from their Gaussians",
            ),
            "vision, then text", "gaussians", "k * (2 * d * (d + 1) + 4 * d + 8)", text=True, moves=True,
            citation="Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning. arXiv 2511.10974.",
        ),
        Entry(
            "dmc-ot", "DMC-OT: DMC, Gaussians calibrated, prompts per task", dmc_ot.DMCOT, dmc_ot.Config,
            "arXiv 2511.10974",
            (
                "stage 1: vision moves, class texts are the frozen anchor",
                "calibration: every old Gaussian follows the encoder by an affine map",
                "statistics: a Gaussian per new class from one pass of the new encoder",
                "stage 2: text moves (a shared and a task's prompt block), vision is frozen; old classes are drawn",
            ),
            "vision, then text", "gaussians", "k * (2 * d * (d + 1) + 4 * d + 8)", text=True, moves=True,
            citation="Preserving Cross-Modal Consistency for CLIP-based Class-Incremental Learning. arXiv 2511.10974.",
        ),
        Entry(
            "spa", "SPA: patches chosen by descriptions", spa.SPA, spa.Config,
            "arXiv 2605.13835",
            (
                "one pass: descriptions choose patches, transport weighs them into the local feature",
                "projectors of the task on class token and local feature, old classes drawn in both",
                "statistics: a Gaussian per new class",
            ),
            "projectors", "gaussians", "k * (4 * d * (2 * d + 1) + 8 * d + 8)", text=True, descriptions=True,
            citation="Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning. arXiv 2605.13835.",
        ),
    )
}  # fmt: skip


def method_named(name: str) -> Entry:
    """Raises UnknownName with the nearest names."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]
