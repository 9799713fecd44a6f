"""RAPF: one linear map behind a frozen image tower, apart where class texts are near, fused after every task.

Source: Huang et al., Class-Incremental Learning with CLIP: Adaptive Representation Adjustment and Parameter Fusion (ECCV
2024), arXiv 2407.14143. Its abstract and published summaries were read, its equations were not, so none is cited by number.
[P] marks what they state: frozen towers and a linear adapter trained by cross entropy on cosines; a Gaussian per class to
draw old ones from; pairs of an old and a new class whose texts are nearer (Euclidean) than a threshold, kept apart by a
hinge loss on draws of the old one; after training, old and new weights fused in an orthonormal basis. Formulas and numbers
are ours [I].

Letters: x unit embedding of an image, W adapter (d x d), z = W x / |W x|; t_c unit text of class c; s scale; N(mu_c, S_c)
Gaussian of class c, over x; U singular vectors of the old W.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.data.stream import Task
from cairn.maths.losses import class_cross_entropy
from cairn.maths.shrinkage import Oas, Shrinkage
from cairn.maths.similarity import unit
from cairn.memory.covariances import Covariance, Full
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.replay import ReplayBatches
from cairn.methods.protocol import FROZEN
from cairn.methods.settings import kind_by_name
from cairn.methods.stages import class_anchors
from cairn.methods.unit_rows import UnitRows
from cairn.towers.protocol import Towers
from cairn.towers.state import State, flattened, part
from cairn.training.checkpoint import Checkpoint
from cairn.training.encode import encoded
from cairn.training.fit import fit
from cairn.training.log import Log
from cairn.training.schedule import Schedule
from cairn.training.seeds import Seeds
from cairn.types import Features, Labels, Pixels, Scores


class Config(BaseModel):
    """The settings of RAPF."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(
        0.65,
        ge=0,
        description="alpha: an old and a new class are neighbours if |t_i - t_j| is below it; 0: none are [I]",
    )
    separation: float = Field(1.0, ge=0, description="weight of the hinge loss between neighbours [I]")
    margin: float = Field(0.1, ge=0, description="by how much nearer the right text must be, in the hinge loss [I]")
    fusion: float = Field(
        1.0,
        ge=0,
        description="an entry that changed by so many times the average change is half the old one; 0: all new [I]",
    )
    covariance: Covariance = Field(
        Full(), description="what is kept of a class: full, low_rank, diagonal or shared [I]"
    )
    shrinkage: Shrinkage = Field(Oas(), description="how a covariance of few images is made usable: oas or ridge [I]")
    real_share: float | None = Field(
        None, ge=0, le=1, description="share of real rows in a batch; null: each class the same share [I]"
    )
    schedule: Schedule = Field(Schedule(epochs=10, batch=128, lr=1e-3), description="training of the adapter [I]")

    _kinds = field_validator("covariance", "shrinkage", mode="before")(kind_by_name)


class RAPF(UnitRows):
    """argmax_c s cos(W f(x), t_c)."""

    encoder = FROZEN

    def __init__(self, towers: Towers, config: Config, *, seed: int, log: Log):
        self.towers, self.config, self.log, self.seeds = towers, config, log, Seeds(seed)
        self.W = torch.eye(towers.dim)
        self.anchors = torch.zeros(0, towers.dim)
        self.memory = GaussianMemory(towers.dim, covariance=config.covariance, shrinkage=config.shrinkage)

    @property
    def memory_bytes(self) -> int:
        return self.memory.bytes

    def learn(self, task: Task, checkpoint: Checkpoint | None = None) -> None:
        config, s = self.config, self.towers.logit_scale
        seeds, log = self.seeds.at(task=task.index), self.log.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, log).cpu()])
        x, y = encoded(loader, lambda pixels, _: unit(self.towers.image(pixels)), checkpoint, "X")

        # Cross entropy on new images and draws of old classes, and the hinge loss on what is drawn of neighbours [P].
        old, device = self.memory, torch.device(self.towers.device)
        W, T = nn.Parameter(self.W.to(device, copy=True)), self.anchors.to(device)
        near = neighbours(T, task.classes.start, config.threshold)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            z, y = unit(x.to(device) @ W.T), y.to(device)
            return class_cross_entropy(z, T, y, s) + config.separation * hinge(z, T, y, near, config.margin)

        batches = ReplayBatches(x, y, old, batch=config.schedule.batch, real_share=config.real_share)
        fit(loss, [W], batches, config.schedule, seeds, log, checkpoint)
        old.tell_repairs(log)

        # Decomposed parameter fusion [P]. The first task has no older weights to hold on to.
        new = W.detach().cpu()
        self.W = fused(self.W, new, config.fusion) if old.classes else new
        self.memory = old.add(x, y)

    def forget(self, c: int) -> None:
        self.anchors = torch.cat([self.anchors[:c], self.anchors[c + 1 :]])
        self.memory = self.memory.without(c)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    def row_scores(self, x: Features) -> Scores:
        return self.towers.logit_scale * unit(x @ self.W.to(x.device).T) @ self.anchors.to(x.device).T

    def state_dict(self) -> State:
        return {"W": self.W, "anchors": self.anchors} | flattened({"memory": self.memory.state_dict()})

    def load_state_dict(self, state: State) -> None:
        self.W, self.anchors = state["W"], state["anchors"]
        self.memory = GaussianMemory.from_state(part(state, "memory"), self.config.covariance, self.config.shrinkage)


def neighbours(T: Float[Tensor, "k d"], start: int, threshold: float) -> Bool[Tensor, "k k"]:
    """Whether i is an old class (number below `start`), j a new one, and |t_i - t_j| < threshold."""
    number = torch.arange(len(T), device=T.device)
    pairs = (number[:, None] < start) & (number >= start)
    return pairs & (torch.cdist(T, T, compute_mode="donot_use_mm_for_euclid_dist") < threshold)


def hinge(
    z: Float[Tensor, "n d"], T: Float[Tensor, "k d"], y: Labels, near: Bool[Tensor, "k k"], margin: float
) -> Float[Tensor, ""]:
    """Mean of max(0, |z_i - t_{y_i}| - |z_i - t_j| + margin) over rows i and neighbours j of their class; 0 without any."""
    distances = torch.cdist(z, T, compute_mode="donot_use_mm_for_euclid_dist")
    short = (distances.gather(1, y[:, None]) - distances + margin).relu()
    return (short * near[y]).sum() / near[y].sum().clamp(min=1)


def fused(old: Float[Tensor, "d d"], new: Float[Tensor, "d d"], fusion: float) -> Float[Tensor, "d d"]:
    """Old and new weights, mixed entry by entry in the basis U of the old ones' left singular vectors.

    R = U^T old,  R' = U^T new,  D = |R' - R|,  M = D / (D + fusion mean(D));  U (R + M (R' - R)).
    What changed much is the new task's and is taken from the new weights, what hardly changed stays. Float64 inside.
    """
    U = torch.linalg.svd(old.double()).U
    R, change = U.T @ old.double(), U.T @ (new - old).double()
    D = change.abs()
    M = D / (D + fusion * D.mean()).clamp(min=torch.finfo(D.dtype).tiny)
    return (U @ (R + M * change)).to(old.dtype)
