"""The contract of a method: `Method` and its `Card`, which every method has, and the capabilities that only some have.

`Method` is structural: a method need not inherit anything. A capability is an abstract class, most with a default
implementation. A method has it by inheriting it, and is asked for it with `isinstance`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from cairn.data.task import Task
from cairn.maths.similarity import CosineScores, unit
from cairn.memory.protocol import ClassMemory
from cairn.settings import NoSettings, Settings
from cairn.towers.protocol import Towers
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context, Log
from cairn.types import Features, Labels, Pixels, Scores, State

FROZEN = "frozen"
"""The `encoder` of a method whose embeddings are, or begin with, those of the towers as they came."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a method declares of itself: `cairn list` and `cairn explain` show it, a run holds the method to it."""

    title: str
    source: str
    """The paper in two words, as in a citation."""
    citation: str = ""
    config: type[Settings] = NoSettings
    """The class of its settings."""
    stages: tuple[str, ...]
    """What `learn` does, one line each."""
    trains: str
    """What is trained, or `nothing`."""
    keeps: str
    """What remains of old classes: `nothing`, `means`, `gaussians`, `second-order` (sums over all classes together),
    `generators`, `exemplars` (embeddings of single images), `buffer` (prepared images in its own state, at most so many) or
    `images`, which are attached to it anew when it goes on. With one of the last three a method is not exemplar-free."""
    bytes: Callable[[int, int, int, int, int], int] = lambda k, d, n, i, w: 0
    """The size of what is kept with default settings, for k classes, d numbers per embedding, n images learned from, i bytes
    of an image and w numbers before the projection."""
    needs: str = "images"
    """What it learns from, and what else helps."""
    passes: str
    """How often an image passes the image tower in learning."""
    text: bool = False
    """Whether class texts are used."""
    label_sets: bool = False
    """Whether it learns images that show several classes as they are, from `Task.label_sets`, and a score says by itself whether
    the image shows the class; otherwise `Task.train` has such images once for every class, and scores tell the classes of one
    image apart."""
    closed_form: bool = False
    """Whether a task is learned without steps of an optimiser: from features that are there it is learned again in no time."""
    moves: bool = False
    """Whether the image encoder is trained, once or in every task."""
    older: Mapping[str, Any] = field(default_factory=dict)
    """For settings that came later, what a learner from before them was made with."""
    former: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it no longer has, with the value that meant nothing: a stored one of that value is left out."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Settings with which it learns in seconds, for tests."""

    @property
    def exemplar_free(self) -> bool:
        return self.keeps not in ("exemplars", "buffer", "images")


@runtime_checkable
class Method(Protocol):
    """A learner of tasks.

    Scoring is split in two, `scores(embed(pixels))`, so that whoever evaluates may keep embeddings while `encoder`
    stays the same string: a frozen tower then sees each test image once, whatever the number of tasks.
    """

    card: Card
    towers: Towers
    config: Settings

    def __init__(self, towers: Towers, config: Any, *, seed: int): ...

    @property
    def encoder(self) -> str:
        """Names the state of the image side: equal strings, equal embeddings."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes kept of old classes beyond trained parameters."""
        ...

    def learn(self, task: Task, ctx: Context) -> None:
        """Learn a task's classes from its training images; later tasks are never seen. Images of classes seen before are
        learned on. Everything random comes from the seeds of `ctx`, the place of the whole run. Called again with the state from
        before the task, it takes up the work that the checkpoint of `ctx` knows of."""
        ...

    def embed(self, pixels: Pixels) -> Features:
        """What scoring needs of each image, one row: its embedding by the image side as it stands, which is compared with
        class texts where no class was learned, and behind it whatever else the method takes."""
        ...

    def scores(self, features: Features) -> Scores:
        """One column per class seen, in order of arrival."""
        ...

    def forget(self, c: int) -> None:
        """Without class number `c`: its texts and statistics go, later classes move up. What shared weights learned of it
        stays."""
        ...

    def state_dict(self) -> State:
        """What was learned. Later learning does not change it."""
        ...

    def load_state_dict(self, state: State) -> None: ...


class ScoresAsModule(ABC):
    """Scores of prepared pixels can be computed by one module of plain products: the method can be exported."""

    @abstractmethod
    def scores_module(self) -> nn.Sequential:
        """Two modules, pixels to rows (n, d) and rows to scores (n, k), in float32 on the processor, apart from the method.
        Raises ConfigError where the settings add something that no such module has."""


class CosineForm(NamedTuple):
    """Scores as one module and one matrix: s cos(vision(pixels), matrix_c)."""

    vision: nn.Module
    """A copy of the image side, up to what is compared with the rows."""
    matrix: Features
    """One row per class."""


class CosineScoring(ScoresAsModule):
    """Scores are scaled cosines s cos(f(x), w_c) of an image embedding and one vector per class.

    `embed` is to give f(x) alone.
    """

    towers: Towers

    @property
    @abstractmethod
    def class_matrix(self) -> Features:
        """w_c, one unit row per class."""

    def vision(self) -> nn.Module:
        """A copy of the image side f: that of the towers where the method has none of its own."""
        return self.towers.vision()

    def cosine_form(self) -> CosineForm:
        """Raises ConfigError where the settings add something else to the scores."""
        return CosineForm(self.vision(), self.class_matrix)

    def scores_module(self) -> nn.Sequential:
        form = self.cosine_form()
        return nn.Sequential(form.vision, CosineScores(form.matrix, self.towers.logit_scale)).cpu().float().eval()

    def scores(self, features: Features) -> Scores:
        return self.row_scores(unit(features))

    def row_scores(self, z: Features, /) -> Scores:
        """Scores of unit rows."""
        return self.towers.logit_scale * z @ self.class_matrix.to(z.device).T


Memory = TypeVar("Memory", bound=ClassMemory)


class GaussianScoring(ABC, Generic[Memory]):
    """Keeps statistics of rows, from which new ones are drawn, and scores rows that are no images. By default a row is the
    unit embedding of an image."""

    memory: Memory

    @property
    def memory_bytes(self) -> int:
        return self.memory.bytes

    def memory_rows(self, features: Features, /) -> Features:
        """Rows as the memory holds them."""
        return unit(features)

    def on_sphere(self, drawn: Features, /) -> Features:
        """Draws from the memory, where rows of images lie."""
        return unit(drawn)

    @abstractmethod
    def row_scores(self, z: Features, /) -> Scores:
        """One column per class seen."""

    def scores(self, features: Features) -> Scores:
        return self.row_scores(self.memory_rows(features))


class PatchReasons(ABC):
    """Tells which patches of an image speak for a class, and for which sentence."""

    @property
    @abstractmethod
    def has_reasons(self) -> bool:
        """Whether it does so with its settings."""

    @abstractmethod
    def reasons(self, features: Features, best: int = 3) -> list[dict[str, Any]]:
        """For one image, as `embed` gives it, its `best` classes: `class`, `score` and `patches`. Raises ConfigError without
        `has_reasons`."""

    @abstractmethod
    def patch_grid(self, features: Features) -> int:
        """Patches along a side of an image."""


class DescribedClasses(ABC):
    """Learns from sentences about classes, where there are any."""

    @property
    @abstractmethod
    def needs_sentences(self) -> bool:
        """Whether, with its settings, a new class must come with sentences of its own."""


class KeepsSums(ABC):
    """What it keeps of images are sums: an image can be taken out of them again, and those of two classes be joined."""

    @property
    def trained(self) -> str | None:
        """What, with its settings, holds images beyond its sums, so that neither can be done; None: nothing."""
        return None

    @abstractmethod
    def unlearn(self, features: Features, labels: Labels) -> None:
        """As if images that were learned, given as `embed` has them, had not been. Classes of which none is left stay for
        `forget`. Raises DataError for images that the sums do not hold."""

    @abstractmethod
    def merge(self, c: int, other: int) -> None:
        """As if the images of class `other` had been learned as class c < other; later classes move up. A text stays that of c."""


class NamesClasses(ABC):
    """Holds something that it made of a class's name: its text, prompt or sentences."""

    @abstractmethod
    def rename(self, c: int, named: Task, log: Log) -> None:
        """With what it made of the name of class number `c` made anew of the name, the templates and the descriptions of `named`,
        a task of that class alone, without images. What was trained stays. Raises a CairnError where nothing can be made of the
        name."""


class KeepsImages(ABC):
    """Learns again on the images of earlier tasks, which its state does not hold."""

    tasks: list[Task]

    def attach_images(self, tasks: Sequence[Task]) -> None:
        """The tasks learned so far, whose images a state does not hold."""
        self.tasks = list(tasks)


class HoldsOut(ABC):
    """Scores images of each task before it learns from them."""

    held_out: tuple[Scores, Labels] | None
    """Scores and labels of those of the task that was learned last."""


class LearnsOnline(ABC):  # noqa: B024 - nothing is left to write
    """Learns a task chunk after chunk: `learn` goes over each image once and needs no others beside it."""

    @property
    def repeats(self) -> str | None:
        """What, with its settings, goes over images more than once; None: nothing."""
        return None


class Segments(ABC):
    """Tells which parts of an image show which class."""

    @abstractmethod
    def segment(self, features: Features) -> Float[Tensor, "n c g g"]:
        """Of each image, as `embed` gives it, the probabilities of every patch: column 0 the background, then a column per class
        seen."""

    @property
    @abstractmethod
    def finds_objects(self) -> bool:
        """Whether it has seen background: of images without masks every patch is the object's."""


class LearnsUnlabelled(ABC):  # noqa: B024 - nothing is left to write
    """Learns from `Task.unlabelled`, the images of a task that have no labels, too. Others are not to open them: where they are to be
    learned from, a teacher tells what they show (`cairn.classifier.self_training`)."""


def without_labels_unused(name: str, method: Method, number: int) -> str | None:
    """What is to be said where so many images without labels come to a method that passes them over."""
    if not number or isinstance(method, LearnsUnlabelled):
        return None
    return f"{name} learns from labelled images alone: {number:,} without labels are not used"


class LeavesOut(ABC):
    """Scores the images of each task as if each had not been learned, exactly and without learning again."""

    left_out: tuple[Scores, Labels] | None
    """Scores among all classes seen, and labels, of the task that was learned last: of all its images, or of as many as the
    method scores so. None before any, and where images without labels were learned beside them: these were taken for what all images
    of the task told."""


class TunesImageTower(ABC):
    """Trains an image side, from some part of its tower on, and `embed` is that image side alone."""

    image: ImageEncoder

    @property
    def trunk(self) -> Callable[[Pixels], Pixels] | None:
        """What the parts of the tower that are never trained make of images, the same after every task: `embed` takes it in place
        of the pixels and gives the same, to the bit. None where that is not worth keeping."""
        return self.image.trunk if self.image.has_trunk else None


class ChoosesRanks(ABC):
    """Gives each task a rank of its own: how many directions of it are trained, or remain."""

    ranks: list[int]
    """Of the tasks learned so far; 0 where nothing was trained."""


CAPABILITIES: tuple[type, ...] = (
    ScoresAsModule,
    CosineScoring,
    GaussianScoring,
    PatchReasons,
    DescribedClasses,
    KeepsSums,
    NamesClasses,
    KeepsImages,
    HoldsOut,
    LeavesOut,
    ChoosesRanks,
    TunesImageTower,
    LearnsOnline,
    LearnsUnlabelled,
    Segments,
)
