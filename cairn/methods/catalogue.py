"""The table of methods: one row each, and nothing else to register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from cairn.config import EmbeddingForm
from cairn.errors import UnknownName
from cairn.methods import (
    acil,
    aper,
    cgil,
    clipood,
    dmc,
    dmc_ot,
    engine,
    finetune,
    joint,
    lda,
    proof,
    ranpac,
    rapf,
    simplecil,
    slca,
    spa,
    zero_shot,
)
from cairn.methods.protocol import (
    CosineScoring,
    DescribedClasses,
    GaussianScoring,
    KeepsImages,
    PatchReasons,
)
from cairn.towers.protocol import Towers


def gaussian(d: int) -> int:
    """Bytes of a full Gaussian: covariance, mean and count."""
    return 2 * d * (d + 1) + 4 * d + 8


@dataclass(frozen=True)
class Entry:
    """What a method declares: `cairn list` and `cairn explain` show it, a run holds the method to it.

    `trains` is what is trained, `keeps` what remains of old classes: `nothing`, `means`, `gaussians`, `second-order`
    (sums over all classes together), `generators`, `exemplars` (embeddings of single images) or `images`. A method that
    keeps one of the last two is not exemplar-free. `bytes` is the size of what is kept with default settings, for
    k classes, d numbers per embedding, n images learned from, i bytes of an image and w numbers before the projection.

    `text` says that class texts are used, `needs_text` that it does not work without; `descriptions` that sentences
    about classes are used where there are any; `moves` that the image encoder is trained, once or in every task.
    `capabilities` are those of `cairn.methods.protocol` that the method has. `older` has, for settings that came later,
    what a learner from before them was made with.
    """

    name: str
    title: str
    build: Callable[..., Any]
    config: type[BaseModel]
    source: str
    stages: tuple[str, ...]
    trains: str
    keeps: str
    bytes: Callable[[int, int, int, int, int], int] = lambda k, d, n, i, w: 0
    text: bool = False
    needs_text: bool = False
    descriptions: bool = False
    moves: bool = False
    capabilities: tuple[type, ...] = ()
    older: Mapping[str, Any] = field(default_factory=dict)
    citation: str = ""

    @property
    def exemplar_free(self) -> bool:
        return self.keeps not in ("exemplars", "images")

    @property
    def uses(self) -> tuple[str, ...]:
        """What else the method needs or does, in words."""
        claims = {"text": self.text, "descriptions": self.descriptions, "moves the encoder": self.moves}
        return tuple(what for what, holds in claims.items() if holds)

    def default_config(self, towers: Towers) -> BaseModel:
        """The method's defaults; on precomputed embeddings those of its embedding form, if it has one."""
        return self.config() if towers.has_images else self.embedding_config()

    @property
    def has_embedding_form(self) -> bool:
        """Whether it has a form of its own for precomputed embeddings."""
        return issubclass(self.config, EmbeddingForm)

    def embedding_config(self) -> BaseModel:
        """The defaults on precomputed embeddings."""
        return self.config.embedding() if issubclass(self.config, EmbeddingForm) else self.config()

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a learner's record holds, all there were, with `older` for those that came later."""
        return _completed(config, self.older)


def _completed(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """`config` and, at whatever depth, what `older` has and it has not."""
    nested = {key: _completed(config[key], value) for key, value in older.items()
              if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)}  # fmt: skip
    return {**older, **config, **nested}


METHODS = {
    entry.name: entry
    for entry in (
        Entry(
            "zero-shot", "Zero-shot CLIP", zero_shot.ZeroShot, zero_shot.Config,
            "Radford et al. 2021", ("class texts from templates",), "nothing", "nothing", text=True, needs_text=True,
            capabilities=(CosineScoring,),
            citation="Radford et al. Learning Transferable Visual Models From Natural Language Supervision. ICML 2021.",
        ),
        Entry(
            "simplecil", "SimpleCIL: class means", simplecil.SimpleCIL, simplecil.Config,
            "Zhou et al. 2023", ("mean embedding per class",), "nothing", "means", lambda k, d, n, i, w: k * (4 * d + 8),
            capabilities=(CosineScoring,),
            citation="Zhou et al. Revisiting Class-Incremental Learning with Pre-Trained Models. arXiv 2303.07338.",
        ),
        Entry(
            "lda", "Discriminant analysis: class means, one covariance", lda.LDA, lda.Config,
            "Hayes & Kanan 2020", ("mean embedding per class, one covariance for all",), "nothing", "gaussians",
            lambda k, d, n, i, w: k * (4 * d + 8) + 2 * d * (d + 1),
            capabilities=(GaussianScoring,),
            citation="Hayes, Kanan. Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis. CVPR Workshops "
            "2020. arXiv 1909.01520.",
        ),
        Entry(
            "acil", "ACIL: recursive least squares", acil.ACIL, acil.Config,
            "Zhuang et al. 2022", ("one pass of the frozen tower, random features", "recursive update of the linear head"),
            "head", "second-order", lambda k, d, n, i, w: 8 * 2048**2,
            citation="Zhuang et al. ACIL: Analytic Class-Incremental Learning with Absolute Memorization and Privacy Protection. "
            "NeurIPS 2022. arXiv 2205.14922.",
        ),
        Entry(
            "ranpac", "RanPAC: random features, ridge chosen per task", ranpac.RanPAC, ranpac.Config,
            "McDonnell et al. 2023",
            (
                "phase 1, first task alone: the image encoder is tuned (off by default)",
                "phase 2: random features, second-order statistics; a ridge chosen on held-out images of the task",
            ),
            "head", "second-order", lambda k, d, n, i, w: 4 * min(n, 10000) * (10000 + k),
            citation="McDonnell et al. RanPAC: Random Projections and Pre-trained Models for Continual Learning. NeurIPS 2023. "
            "arXiv 2307.02251.",
        ),
        Entry(
            "aper", "APER: class means of the adapted and the original encoder", aper.APER, aper.Config,
            "Zhou et al. 2023",
            ("first task alone: the image encoder is adapted", "mean per class of [original ; adapted] embeddings"),
            "vision, first task", "means", lambda k, d, n, i, w: k * (8 * d + 8), moves=True,
            citation="Zhou et al. Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity "
            "are All You Need. arXiv 2303.07338.",
        ),
        Entry(
            "clipood", "CLIPood: margins between class texts, averaged weights", clipood.CLIPood, clipood.Config,
            "Shu et al. 2023", ("stage 1: vision against class texts, with margins; the weights end as their Beta average",),
            "vision", "nothing", text=True, moves=True,
            capabilities=(CosineScoring,),
            citation="Shu et al. CLIPood: Generalizing CLIP to Out-of-Distributions. ICML 2023. arXiv 2302.00864.",
        ),
        Entry(
            "slca", "SLCA: slow learner, classifier aligned on draws", slca.SLCA, slca.Config,
            "Zhang et al. 2023",
            (
                "stage 1: vision learns slowly, beside a linear classifier of the task's classes",
                "statistics: a Gaussian per class from one pass of the new encoder",
                "stage 2: the classifier alone, on draws of all classes, with normalised logits",
            ),
            "vision, then head", "gaussians", lambda k, d, n, i, w: k * gaussian(d), moves=True,
            capabilities=(GaussianScoring,), older={"stage2": {"normalise": "all", "shrink": 0.0}},
            citation="Zhang et al. SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model. "
            "ICCV 2023. arXiv 2303.05118.",
        ),
        Entry(
            "rapf", "RAPF: linear adapter, neighbours kept apart, weights fused", rapf.RAPF, rapf.Config,
            "Huang et al. 2024",
            (
                "adapter: cross entropy and, on draws of old classes with a new neighbour by text, a hinge loss",
                "fusion: old and new weights entry by entry in an orthonormal basis",
                "statistics: a Gaussian per new class",
            ),
            "adapter", "gaussians", lambda k, d, n, i, w: k * gaussian(d), text=True,
            capabilities=(GaussianScoring,),
            older={"start": "identity", "unit_features": True, "hinge": "distance", "pair_draws": None, "mask": "ratio"},
            citation="Huang et al. Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and Parameter Fusion. "
            "ECCV 2024. arXiv 2407.14143.",
        ),
        Entry(
            "cgil", "CGIL: generators of embeddings, class prompts on draws", cgil.CGIL, cgil.Config,
            "Frascaroli et al. 2024",
            (
                "stage 1: a variational autoencoder per class of the task, on frozen embeddings",
                "stage 2: class texts on draws of all classes seen, new ones too",
            ),
            "text", "generators", lambda k, d, n, i, w: k * (4 * (64 * (16 + 1) + 66 * d) + 8), text=True,
            capabilities=(CosineScoring, GaussianScoring),
            citation="Frascaroli et al. CLIP with Generative Latent Replay: a Strong Baseline for Incremental Learning. BMVC 2024. "
            "arXiv 2407.15793.",
        ),
        Entry(
            "proof", "PROOF: projections per task, images and classes fused", proof.PROOF, proof.Config,
            "Zhou et al. 2025",
            (
                "one pass of the frozen towers: class means, class texts",
                "projections and prompts of the task, and the attention, on its images and the exemplars of old classes",
                "exemplars: embeddings of each new class, herded towards its mean",
            ),
            "projectors", "exemplars", lambda k, d, n, i, w: 4 * d * min(n, 20 * k) + k * (4 * d + 16), text=True,
            citation="Zhou et al. Learning without Forgetting for Vision-Language Models. IEEE Transactions on Pattern Analysis "
            "and Machine Intelligence 2025. arXiv 2305.19270.",
        ),
        Entry(
            "engine", "ENGINE: descriptions injected, likeliest classes re-ranked", engine.ENGINE, engine.Config,
            "Zhou et al. 2025",
            (
                "one pass of the frozen tower: images and altered copies of them",
                "units of the task: texts towards descriptions, images towards altered ones, noisy means of old classes",
                "discriminant head: class means and one covariance of the features before the projection",
                "at test: head, cosines and the likeliest classes by the sentences that tell them apart, as weighed",
            ),
            "projectors", "gaussians", lambda k, d, n, i, w: k * (4 * (d + w) + 16) + 2 * w * (w + 1), text=True,
            descriptions=True, capabilities=(DescribedClasses,),
            older={"stat": 0.0, "rerank": 0.5, "loss": "cross_entropy"},
            citation="Zhou et al. External Knowledge Injection for CLIP-Based Class-Incremental Learning. ICCV 2025. "
            "arXiv 2503.08510.",
        ),
        Entry(
            "finetune", "Fine-tuning without memory", finetune.FineTune, finetune.Config,
            "the field's baseline", ("stage 1: vision against class texts",), "vision", "nothing", text=True, moves=True,
            capabilities=(CosineScoring,),
            citation="The plain sequential fine-tuning baseline of the class-incremental literature.",
        ),
        Entry(
            "joint", "Joint training on all images so far", joint.Joint, joint.Config,
            "the field's baseline", ("stage 1 on all images so far", "stage 2 on all images so far"),
            "vision, then text", "images", lambda k, d, n, i, w: n * i, text=True, moves=True,
            capabilities=(CosineScoring, KeepsImages),
            citation="The joint-training baseline of the class-incremental literature.",
        ),
        Entry(
            "dmc", "DMC: decoupled stages, Gaussian replay", dmc.DMC, dmc.Config,
            "arXiv 2511.10974",
            (
                "stage 1: vision moves, class texts are the frozen anchor",
                "statistics: a Gaussian per class from one pass of the new encoder",
                "stage 2: text moves, vision is frozen; old classes are drawn from their Gaussians",
            ),
            "vision, then text", "gaussians", lambda k, d, n, i, w: k * gaussian(d), text=True, moves=True,
            capabilities=(CosineScoring, GaussianScoring),
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
            "vision, then text", "gaussians", lambda k, d, n, i, w: k * gaussian(d), text=True, moves=True,
            capabilities=(CosineScoring, GaussianScoring),
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
            "projectors", "gaussians", lambda k, d, n, i, w: k * gaussian(2 * d), text=True, descriptions=True,
            capabilities=(CosineScoring, GaussianScoring, PatchReasons, DescribedClasses),
            citation="Unlocking Patch-Level Features for CLIP-Based Class-Incremental Learning. arXiv 2605.13835.",
        ),
    )
}  # fmt: skip


def method_named(name: str) -> Entry:
    """Raises UnknownName with the nearest names."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]
