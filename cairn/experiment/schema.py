"""What a run is asked for and what it leaves: RunConfig and RunResult, as they stand in `call.json` and `result.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from cairn.config import values_by_path
from cairn.maths.frequency import Frequency
from cairn.settings import Given
from cairn.storage.schema import Amount, Count, Difference, Positive, Share

SCHEMA_VERSION = 1

SEGMENTED = "segmented.json"
"""Pictures that a run has segmented, beside its result."""


def _bad_image(value: Any) -> Any:
    if value not in ("stop", "skip", "error"):
        raise ValueError("must be stop or skip")
    return "error" if value == "stop" else value


OnBadImage = Annotated[Literal["error", "skip"], BeforeValidator(_bad_image)]
"""What to do about image files that cannot be read: `stop` before anything is done, or `skip` them. Stored results call the
first `error`, which is taken as well."""


SettingValues = Annotated[dict[str, JsonValue], BeforeValidator(values_by_path)]
"""Values by path, such as `{"stage1.schedule.epochs": 4}`. Older results hold texts, `["stage1.schedule.epochs=4"]`."""


class RunConfig(Given):
    """Everything that decides a run's numbers. Two runs with equal configs and versions give equal results on a CPU."""

    method: str = Field(description="a name of `cairn list`")
    data: str = Field(default="shapes", description="data set, as written after --data")
    towers: str = Field(
        default="auto", description="towers, as written after --towers; auto: tiny, or the features file itself"
    )
    base: int = Field(default=0, description="classes of the first task; 0: like the others")
    step: int = Field(default=10, description="classes per task")
    order: str = Field(default="natural", description="natural, seed:N or a file of class names")
    seed: int = Field(default=1, ge=0, description="moves every random choice but the class order")
    settings: SettingValues = Field(default={}, description="the method's settings that were changed, by path")
    limit_train: int | None = Field(default=None, description="training images per class at most")
    limit_test: int | None = Field(default=None, description="test images per class at most")
    validation: float = Field(
        default=0.0, description="share of the training images that stands in for the test split; 0: none"
    )
    imbalance: float = Field(
        default=1.0,
        allow_inf_nan=False,
        description="training images of the most frequent class over those of the rarest, in a long tail; 1: as they are",
    )
    stream: Literal["tasks", "online"] = Field(
        default="tasks", description="tasks are learned whole, or online: chunk by chunk, each image seen once"
    )
    chunk: int | None = Field(default=None, description="images in a chunk of an online stream; unset: 100")
    blurry: float = Field(
        default=0.0, description="share of each class's training images that comes with later tasks; 0: sharp borders"
    )
    labelled: float = Field(
        default=1.0, description="share of each class's training images that keep their label, one at least; 1: all"
    )
    unlabelled: str | None = Field(
        default=None, description="folder of pictures without labels, which come with every task"
    )
    pseudo_labels: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each task's images without labels that are learned as what they are taken for, by methods that do not "
        "learn from them by themselves; unset: none",
    )
    device: str = Field(default="auto", description="torch device")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="arithmetic inside the towers")
    preprocess: Literal["crop", "squash"] | None = Field(
        default=None, description="how images become squares of the towers' size; unset: as the checkpoint says"
    )
    decode: Literal["whole", "reduced"] = Field(
        default="whole",
        description="how JPEG files are decoded: whole, or reduced to no less than twice the towers' size",
    )
    template: str | None = Field(
        default=None, description="one prompt, {} for the class name, in place of the data set's"
    )
    on_bad_image: OnBadImage = Field(
        default="error", description="image files that cannot be read: stop (error) or skip"
    )
    revision: str | None = Field(default=None, description="revision of the towers on the hub")


def usual_step(data: str) -> int:
    """Classes per task where nobody says how many."""
    return 5 if data.partition(":")[0] in ("shapes", "attributes") else 10


def comparable_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A stored call, of a run or of an embedding, as it is compared with another.

    Records of before there were `imbalance`, online streams, images without labels, `pseudo_labels` and `decode` lack them.
    Records of before `preprocess` could be unset say crop, which is what CLIP's checkpoints say; of open_clip's some say
    otherwise, and there unset is not the same. Older ones hold settings as texts.
    """
    call = {
        "imbalance": 1.0,
        "stream": "tasks",
        "chunk": None,
        "blurry": 0.0,
        "labelled": 1.0,
        "unlabelled": None,
        "pseudo_labels": None,
        "decode": "whole",
    } | dict(call)
    if "settings" in call:
        call["settings"] = values_by_path(call["settings"])
    if call.get("preprocess") is None and not str(call.get("towers")).startswith("open_clip:"):
        call["preprocess"] = "crop"
    return call


class TowersUsed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    fingerprint: str = Field(description="over weights, activation and preprocessing, and over the tokenizer")
    revision: str | None = None


class Passes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    images: Count = Field(description="images through the vision tower, forward")
    text_tokens: Count = Field(description="tokens through the text tower, forward")
    stored: Count = Field(default=0, description="images whose embeddings a feature store held, in place of a pass")
    continued: Count = Field(
        default=0,
        description="images whose pass began behind the blocks that are never trained, what those gave being kept",
    )


class RunResult(BaseModel):
    """What a run leaves, as `result.json`. Accuracies are in [0, 1]; B tasks, rows and columns numbered from 0."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    method: str
    exemplar_free: bool = Field(description="false if the method keeps single images, or their embeddings")
    config: dict[str, Any] = Field(description="every setting of the method, defaults included")
    run: RunConfig = Field(description="the call that made this")
    data: str
    split: str = Field(description="fingerprint of which images are in which task")
    towers: TowersUsed
    class_order: list[str] = Field(min_length=1, description="class names in order of arrival")
    task_sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, description="classes per task")
    test_sizes: list[Count] = Field(description="test images per task")
    base: Count
    step: Count
    seed: Count
    metric: Literal["accuracy", "mAP"] = Field(
        default="accuracy",
        description="what `accuracy`, `average`, `last` and all that is made of them are: top-1 accuracy, or, where images may show "
        "several classes, the mean over classes of the average precision",
    )
    precision_by_class: list[Share | None] | None = Field(
        default=None, description="average precision of each class after the last task, where that is the metric"
    )
    macro_f1: Share | None = Field(
        default=None,
        description="where images may show several classes, after the last task: mean of `f1_by_class`; null where accuracy is the "
        "metric, and in older results",
    )
    micro_f1: Share | None = Field(default=None, description="the same of all decisions together")
    seen_macro_f1: list[Share | None] = Field(default=[], description="macro F1 after task i, over all classes seen")
    seen_micro_f1: list[Share | None] = Field(default=[], description="micro F1 after task i, over all classes seen")
    macro_f1_by_task: list[list[Share | None]] = Field(
        default=[], description="[i][j]: after task i, over the classes of task j; null for j > i"
    )
    micro_f1_by_task: list[list[Share | None]] = Field(default=[], description="the same of all decisions together")
    f1_by_class: list[Share | None] | None = Field(
        default=None, description="F1 of each class after the last task, with its threshold"
    )
    thresholds: list[Share] | None = Field(
        default=None,
        description="calibrated probability from which an image is said to show each class, after the last task; from training "
        "images left out",
    )
    accuracy: list[list[Share | None]] = Field(description="A[i][j]: after task i, on task j; null for j > i")
    seen_accuracy: list[Share] = Field(description="A_i: after task i, over all test images of classes seen")
    seen_accuracy_by_class: list[Share] = Field(description="the same, every class weighing alike")
    train_sizes: list[Count] = Field(default=[], description="training images per class, in order of arrival")
    unlabelled_sizes: list[Count] = Field(
        default=[], description="images without labels that came with each task; empty where there are none"
    )
    last_by_frequency: dict[Frequency, Share] | None = Field(
        default=None,
        description="accuracy after the last task, mean over head (100 training images or more), medium, and tail classes (fewer "
        "than 20); null where all classes have as many",
    )
    frequency_terciles: bool = Field(
        default=False, description="whether these groups are thirds of the classes, because one of them would be empty"
    )
    future_accuracy: list[Share | None] = Field(description="zero-shot, after task i, among the classes still to come")
    ece: list[Share | None] = Field(
        default=[],
        description="expected calibration error in 15 bins, after task i, over all test images of classes seen",
    )
    ece_by_chance: list[Share | None] = Field(
        default=[], description="what `ece` would be on average if the probabilities were perfect: chance alone"
    )
    nll: list[Amount | None] = Field(
        default=[],
        description="mean negative log-probability of the true class, after task i, over the same images; in nats",
    )
    temperature: list[Positive | None] = Field(
        default=[],
        description="T of `cairn.maths.calibration`, by which scores become probabilities, after task i; fitted on training "
        "images",
    )
    zero_shot_accuracy: list[Share | None] = Field(
        default=[], description="of the towers as they came, on the classes seen after task i; null without class texts"
    )
    chunk_sizes: list[Count] = Field(default=[], description="training images in each chunk of an online stream")
    chunk_accuracy: list[Share] = Field(
        default=[], description="after each chunk, over all test images of the classes that have come"
    )
    any_time: Share | None = Field(
        default=None, description="area under the curve of that accuracy by images learned; null where tasks are whole"
    )
    mIoU: Share | None = Field(
        default=None,
        description="after the last task, mean over background and classes of the intersection over union of pixels, where the method "
        "segments and the objects of test images are known",
    )
    iou_by_class: list[Share | None] | None = Field(
        default=None, description="that of the background, and of each class in order of arrival"
    )
    average: Share = Field(description="average incremental accuracy, the mean of seen_accuracy")
    last: Share = Field(description="the last of seen_accuracy")
    forgetting: Difference | None = Field(description="null with a single task")
    bwt: Difference | None = Field(description="backward transfer; null with a single task")
    seconds: Amount = Field(description="wall-clock time, learning and evaluation")
    seconds_per_task: list[Amount] = Field(description="of learning alone")
    resumed: Count = Field(default=0, description="how often the run was cut off and gone on with")
    processes: int = Field(default=1, ge=1, description="how many learned side by side, when it ended")
    peak_rss_bytes: Count = Field(description="largest resident memory of the process, of several the largest")
    memory_bytes: Count = Field(description="kept of old classes beyond trained parameters, after the last task")
    ranks: list[Count] | None = Field(
        default=None, description="rank that each task was given; null for a method that chooses none"
    )
    tower_passes: Passes = Field(description="while learning")
    evaluation_passes: Passes
    calibration_passes: Passes | None = Field(default=None, description="while fitting the temperatures")
    device: str
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="arithmetic that was used inside the towers; null: as the call says"
    )
    versions: dict[str, str]
