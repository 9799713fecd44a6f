"""PROOF: projections that grow with the tasks behind two frozen towers, and an attention in which images and classes meet.

Source: Zhou et al., Learning without Forgetting for Vision-Language Models (TPAMI 2025), arXiv 2305.19270. Its abstract,
published reviews and summaries were read, its equations were not, so none is cited by number. [P] marks what they state:
frozen towers; linear projections of both sides, one pair per task, old ones frozen and all of them added up; class means,
class texts and learnable prompts as the context that an image attends to, itself among queries, keys and values; exemplars,
20 per class. [I] is ours: one head, a residual and no normalisation in the attention, prompts that stand still after their
task, all starting points and the schedule. The three matchings are averaged, not added, so that s stays the scale.

The towers never move and images pass them as they are, so what is kept of an exemplar is its embedding.

Letters: x unit embedding of an image, p_c unit mean of class c, t_c its unit text; P_i, P_t projections, z = P_i(x);
C = [P_i(p) ; P_t(t) ; prompts] the context; T the attention; s scale; k classes, d width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cairn.data.loading import Loader
from cairn.data.task import Task
from cairn.maths.rows import without
from cairn.maths.similarity import unit
from cairn.memory.exemplars import Exemplars
from cairn.memory.gaussians import GaussianMemory
from cairn.memory.means import ClassMeans
from cairn.memory.replay import ReplayBatches
from cairn.methods.parts.projector import Projectors
from cairn.methods.parts.stages import class_anchors, renamed_anchors
from cairn.methods.protocol import FROZEN, Card, NamesClasses
from cairn.settings import Settings
from cairn.towers.protocol import Towers
from cairn.training.context import Context, Log
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Pixels, Scores, State, flattened, part


class ProofConfig(Settings):
    """The settings of PROOF."""

    exemplars: int = Field(
        default=20, ge=0, description="embeddings kept per class, chosen by herding; 0: none [P: 20]"
    )
    prompts: int = Field(default=3, ge=0, description="context prompts that each task adds; 0: none [P: some; I: 3]")
    schedule: Schedule = Field(
        default=Schedule(epochs=10, batch=64, lr=0.05, optimizer="sgd"),
        description="training of projections, attention and prompts [I]",
    )


class Fusion(nn.Module):
    """T(a) = a + sum_b softmax_b(s Q a . K b / sqrt(d)) V b over the rows b of a set; Q = K = 1 and V = 0 at first, so
    that T starts as nothing [I].

    s stands for the length of the rows: unit rows are read as if they had length sqrt(s), about that of CLIP's embeddings.
    """

    def __init__(self, d: int, s: float):
        super().__init__()
        self.Q, self.K = nn.Parameter(torch.eye(d)), nn.Parameter(torch.eye(d))
        self.V = nn.Parameter(torch.zeros(d, d))
        self.scale = s / d**0.5

    def cosines(self, z: Float[Tensor, "n d"], C: Float[Tensor, "m d"], number: int) -> Float[Tensor, "n number"]:
        """cos(T(z_i), T(c_j)) for the first `number` rows of C, T over the set [z_i ; C] of each image on its own.

        All but one row of that set is the same for every image. With o_j what c_j takes from C alone and b_ij the share
        that its attention gives to z_i, T(c_j) = c_j + o_j + b_ij (V z_i - o_j): only products of n, m and d numbers are
        formed, none of n m d.
        """
        (k, v), (K, V) = ((rows @ self.K.T, rows @ self.V.T) for rows in (z, C))
        q, Q = z @ self.Q.T, C[:number] @ self.Q.T

        shares = (self.scale * torch.cat([(q * k).sum(1, keepdim=True), q @ K.T], 1)).softmax(1)
        a = unit(z + shares[:, :1] * v + shares[:, 1:] @ V)

        to_context = self.scale * Q @ K.T
        o = to_context.softmax(1) @ V
        b = torch.sigmoid(self.scale * k @ Q.T - to_context.logsumexp(1))
        c = C[:number] + o
        along = a @ c.T + b * ((a * v).sum(1, keepdim=True) - a @ o.T)
        squared = (
            (c * c).sum(1)
            + 2 * b * (v @ c.T - (c * o).sum(1))
            + b**2 * ((v * v).sum(1, keepdim=True) - 2 * v @ o.T + (o * o).sum(1))
        )
        return along / squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()


class PROOF(NamesClasses):
    """argmax_c of the mean of three scores: s cos(z, P_t(t_c)), s cos(T(z), T(P_i(p_c))) and s cos(T(z), T(P_t(t_c)))."""

    card = Card(
        title="PROOF: projections per task, images and classes fused",
        source="Zhou et al. 2025",
        citation="Zhou et al. Learning without Forgetting for Vision-Language Models. IEEE Transactions on Pattern Analysis "
        "and Machine Intelligence 2025. arXiv 2305.19270.",
        config=ProofConfig,
        stages=(
            "one pass of the frozen towers: class means, class texts",
            "projections and prompts of the task, and the attention, on its images and the exemplars of old classes",
            "exemplars: embeddings of each new class, herded towards its mean",
        ),
        trains="projectors",
        keeps="exemplars",
        bytes=lambda k, d, n, i, w: 4 * d * min(n, 20 * k) + k * (4 * d + 16),
        needs="images; texts help",
        passes="one per image, can be cached",
        text=True,
        quick={"schedule.epochs": 2, "schedule.batch": 4},
    )

    encoder = FROZEN

    def __init__(self, towers: Towers, config: ProofConfig, *, seed: int):
        self.towers, self.config = towers, config
        self.device = towers.device
        self.projectors = Projectors(towers.dim, ("visual", "textual")).to(self.device)
        self.fusion = Fusion(towers.dim, towers.logit_scale).to(self.device)
        self.prompts = torch.zeros(0, towers.dim)
        self.anchors = torch.zeros(0, towers.dim)
        self.means = ClassMeans.empty(towers.dim)
        self.exemplars = Exemplars.empty(towers.dim)

    @property
    def memory_bytes(self) -> int:
        return self.means.bytes + self.exemplars.bytes

    def learn(self, task: Task, ctx: Context) -> None:
        config, d = self.config, self.towers.dim
        ctx = ctx.at(task=task.index)
        loader = Loader(task.train, self.towers.prepare, self.towers.pixels, batch=config.schedule.batch)
        self.anchors = torch.cat([self.anchors, class_anchors(self.towers, task, loader, ctx.log).cpu()])
        x, y = encode(loader, lambda z, _: unit(z), ctx, "X", embed=self.embed)
        self.means = self.means.add(x, y)

        # This task's projections [P] and prompts [I] are new, those before stand still; T is trained on.
        self.projectors.grow()
        fresh = 0.02 * torch.randn(config.prompts, d, generator=ctx.seeds.generator("prompts"))
        prompts = nn.Parameter(fresh.to(self.device))
        trained = [*self.projectors.current, *self.fusion.parameters(), prompts]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            y = y.to(self.device)
            matched, seen, read = (cross_entropy(scores, y) for scores in self._three(x.to(self.device), prompts))
            return matched + seen + read

        # The task's images and the exemplars of all others, as one set [P].
        rows, labels = torch.cat([x, self.exemplars.rows]), torch.cat([y, self.exemplars.labels])
        batches = ReplayBatches(
            rows, labels, GaussianMemory(d), batch=config.schedule.batch, real_share=None, device=self.device
        )
        fit(loss, trained, batches, config.schedule, ctx.logged_at(stage=1))
        self.prompts = torch.cat([self.prompts, prompts.detach().cpu()])
        self.exemplars = self.exemplars.add(x, y, self.means.means, config.exemplars)

    def _three(self, x: Features, *more: Tensor) -> tuple[Scores, Scores, Scores]:
        """Projected, visual and textual matching, `more` prompts behind those of finished tasks."""
        visual, textual = self.projectors["visual"], self.projectors["textual"]
        s, k = self.towers.logit_scale, len(self.anchors)
        p, t, prompts = (rows.to(self.device) for rows in (unit(self.means.means), self.anchors, self.prompts))
        z, W = visual(x), textual(t)
        fused = s * self.fusion.cosines(z, torch.cat([visual(p), W, prompts, *more]), 2 * k)
        return s * z @ W.T, fused[:, :k], fused[:, k:]

    def forget(self, c: int) -> None:
        self.anchors = without(self.anchors, c)
        self.means, self.exemplars = self.means.without(c), self.exemplars.without(c)

    def rename(self, c: int, named: Task, log: Log) -> None:
        """The class's text. What was trained with the old one stays."""
        self.anchors = renamed_anchors(self.anchors, c, self.towers, named)

    def embed(self, pixels: Pixels) -> Features:
        return self.towers.image(pixels)

    @torch.no_grad()
    def scores(self, features: Features) -> Scores:
        matched, seen, read = self._three(unit(features.to(self.device)))
        return (matched + seen + read) / 3

    def state_dict(self) -> State:
        modules = {"projectors": self.projectors, "fusion": self.fusion}
        parts = {key: {n: v.cpu().clone() for n, v in m.state_dict().items()} for key, m in modules.items()}
        kept = {"means": self.means.state_dict(), "exemplars": self.exemplars.state_dict()}
        return {"anchors": self.anchors, "prompts": self.prompts} | flattened(parts | kept)

    def load_state_dict(self, state: State) -> None:
        self.anchors, self.prompts = state["anchors"], state["prompts"]
        self.projectors.load_state_dict(part(state, "projectors"))
        self.fusion.load_state_dict(part(state, "fusion"))
        self.means = ClassMeans.from_state(part(state, "means"))
        self.exemplars = Exemplars.from_state(part(state, "exemplars"))
