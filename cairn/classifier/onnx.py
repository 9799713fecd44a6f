"""A learner as one ONNX file: pictures in, probabilities out, for places without Python.

The file has up to three parts, made apart and joined: preprocessing (resize, crop, normalise), the image tower, and what makes
scores and probabilities of its rows. The tower may be in half precision or in 8 bits; the last part, where differences of
large numbers count, is always in float32.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cairn.classifier.classifier import IncrementalClassifier
from cairn.classifier.fitted import require_classes
from cairn.data.in_memory import InMemoryImages, Item, items_of
from cairn.errors import ConfigError, ResultError
from cairn.maths.score_modules import CalibratedScores, IndependentScores
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import ScoresAsModule
from cairn.storage.distribution import extra_remedy
from cairn.storage.files import atomic_write
from cairn.towers.preprocessing import LONGEST, Preprocessing, preprocessing_of

if TYPE_CHECKING:
    from onnx import ModelProto

Form = Literal["float32", "float16", "int8"]
FORMS: tuple[Form, ...] = ("float32", "float16", "int8")

TOLERANCE = 1e-4
"""Largest difference of a score that is let pass in float32, relative to the largest score."""

CHECKED = 8
"""Random images on which the file is compared where none are given."""

OPSET = 18
"""Of the operators: the first with a resize that averages where it makes smaller, as Pillow does."""


@dataclass(frozen=True)
class Exported:
    """What became of it. Compared with the learner on `images` images."""

    path: Path
    bytes: int
    images: int
    difference: float
    """Largest difference of a score, relative to the largest score."""
    probability: float
    """Largest difference of a probability."""
    agreement: float
    """Share of images with the same likeliest class."""


def scores_module(learner: IncrementalClassifier) -> nn.Sequential:
    """Pixels to rows and rows to scores. Raises ConfigError for a method that has no such form, and for features files, which
    have no tower."""
    method = learner.method_
    require_classes(learner)
    if not method.towers.has_images:
        raise ConfigError("learned from embeddings: there is no image tower to export")
    if not isinstance(method, ScoresAsModule):
        able = ", ".join(name for name, entry in METHODS.items() if ScoresAsModule in entry.capabilities)
        raise ConfigError(
            f"method '{learner.chosen_}': its scores are more than plain products of what the image tower gives, so it cannot be "
            f"exported; these can: {able}"
        )
    return method.scores_module()


def export_onnx(
    learner: IncrementalClassifier,
    path: str | os.PathLike[str],
    *,
    form: Form = "float32",
    images: Item | Iterable[Item] | None = None,
    preprocessing: bool = False,
) -> Exported:
    """Write the file, with class names and preprocessing in its metadata, and compare it with the learner on `images`, or on
    random ones.

    Inputs: `pixels` (n, 3, size, size) as the image tower takes them; with `preprocessing` in their place `images`, uint8
    (n, height, width, 3) of any size, equal within a batch. Outputs: `scores` and `probabilities`, (n, k). `form` is that of
    the image tower. Raises ConfigError if packages are missing or there is no such form; ResultError if a float32 file
    is further than TOLERANCE from the learner, or any gives numbers that are not finite. The file is then not kept.
    """
    path = Path(path)
    if form not in FORMS:
        raise ConfigError(f"form '{form}': must be {', '.join(FORMS)}")
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch writes the file with
    except ImportError as error:
        raise ConfigError(f"export: {error.name} is missing; {extra_remedy('onnx')}") from None
    tower, head = scores_module(learner)
    towers, sets = learner.method_.towers, learner.sets_
    pictures, given = _pictures(towers, images), preprocessing_of(towers)
    pixels = towers.pixels(torch.stack([towers.prepare(picture) for picture in pictures])).cpu().float()
    with torch.no_grad():
        rows = tower(pixels)
    with atomic_write(path) as temporary, tempfile.TemporaryDirectory() as folder:
        parts = [
            _in_form(_program(tower, pixels, "pixels", ["rows"]), form, Path(folder)),
            _program(_with_probabilities(head, learner), rows, "rows", ["scores", "probabilities"]),
        ]
        if preprocessing:
            assert given is not None
            parts.insert(0, preprocessing_graph(given))
        proto = _joined(parts)
        about = {
            "classes": list(map(str, learner.classes_)),
            "preprocessing": given.model_dump(mode="json") if given else {},
            "method": learner.chosen_,
            "towers": towers.fingerprint,
        }
        if sets is not None:
            about["thresholds"] = sets.rule.thresholds
        onnx.helper.set_model_props(proto, {f"cairn.{key}": json.dumps(value) for key, value in about.items()})
        onnx.save(proto, temporary)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        given = (
            [{"images": np.asarray(picture)[None]} for picture in pictures]
            if preprocessing
            else [{"pixels": pixels.numpy()}]
        )
        answers = [session.run(["scores", "probabilities"], one) for one in given]
        scores, probabilities = (np.concatenate(column) for column in zip(*answers, strict=True))
        found = _compared(learner, path, pictures, scores, probabilities)
        if not np.isfinite(scores).all():
            raise ResultError(f"'{path}': scores that are not finite in {form}; nothing was kept, take another form")
        if form == "float32" and not preprocessing and not found.difference <= TOLERANCE:
            raise ResultError(f"'{path}': scores differ by {found.difference:.1e} from the learner's; nothing was kept")
        size = temporary.stat().st_size
    return Exported(path, size, len(pictures), found.difference, found.probability, found.agreement)


def _with_probabilities(head: nn.Module, learner: IncrementalClassifier) -> nn.Module:
    if (sets := learner.sets_) is None:
        return CalibratedScores(head, learner.calibration_.temperature, learner.calibration_.power)
    rule = sets.rule
    return IndependentScores(head, rule.slope / rule.scale, torch.tensor(rule.offsets), rule.centred)


def _pictures(towers: Any, images: Item | Iterable[Item] | None) -> list[Any]:
    if images is not None and (items := items_of(images)):
        opened = InMemoryImages(items, np.zeros(len(items), dtype=np.int64))
        return [opened[row] for row in range(len(items))]
    rng = np.random.default_rng(0)
    size = towers.prepare(np.zeros((8, 8, 3), np.uint8)).shape[-1]
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(CHECKED)]


def _compared(
    learner: IncrementalClassifier, path: Path, pictures: list[Any], scores: np.ndarray, probabilities: np.ndarray
) -> Exported:
    expected = learner.predictions(pictures)
    theirs, p = expected.scores.numpy(), expected.probabilities.numpy()
    return Exported(
        path,
        0,
        len(pictures),
        float(np.abs(scores - theirs).max() / np.abs(theirs).max().clip(1e-30)),
        float(np.abs(probabilities - p).max()),
        float((scores.argmax(1) == theirs.argmax(1)).mean()),
    )


def _program(module: nn.Module, example: Tensor, name: str, outputs: Sequence[str]) -> ModelProto:
    """The module in ONNX, with any number of rows."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what it says of torchvision, which nothing here uses
    example = example if len(example) > 1 else torch.cat([example, example])  # one row would be taken for a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            module.eval(),
            (example,),
            input_names=[name],
            output_names=list(outputs),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        )
    if program is None:
        raise ResultError(f"torch wrote no program of {type(module).__name__}")
    return program.model_proto


def _in_form(proto: ModelProto, form: Form, folder: Path) -> ModelProto:
    """The image tower's weights and products in half precision or 8 bits; what goes in and out stays float32."""
    import onnx

    if form == "float32":
        return proto
    if form == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        halved = OnnxModel(convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True))
        halved.topological_sort()  # the casts stand last
        return halved.model
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.save(proto, folder / "tower.onnx")
    with _quiet_log():  # of advice to run a step that dynamic quantisation does without
        quantize_dynamic(
            folder / "tower.onnx",
            folder / "tower-int8.onnx",
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
    return onnx.load(folder / "tower-int8.onnx")


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Nothing below an error is logged meanwhile."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _joined(parts: Sequence[ModelProto]) -> ModelProto:
    """One after another, each one's output the next one's input of the same name."""
    from onnx import compose

    joined = parts[0]
    for number, part in enumerate(parts[1:]):
        for one in (joined, part):
            one.ir_version = 10
        joint = part.graph.input[0].name
        # Names inside a part may stand in another as well
        part = compose.add_prefix(part, f"part{number}-", rename_inputs=False, rename_outputs=False)
        joined = compose.merge_models(joined, part, io_map=[(joint, joint)])
    return joined


RESIZE = {"bicubic": "cubic", "bilinear": "linear", "nearest": "nearest"}
"""Pillow's filters that ONNX has, too."""


def preprocessing_graph(how: Preprocessing) -> ModelProto:
    """uint8 images (n, h, w, 3) to pixels (n, 3, size, size), as `Preprocessing.prepare` and `pixels` make them, to a step of
    256 or two. Raises ConfigError for a filter that ONNX lacks."""
    from onnx import TensorProto, helper

    if how.resample not in RESIZE:
        raise ConfigError(f"resample '{how.resample}': ONNX has {', '.join(RESIZE)}; export without preprocessing")
    graph = _Graph()
    size, edge = graph.whole(how.size), graph.whole(how.edge or how.size)
    one, zero = graph.whole(1), graph.whole(0)
    x = graph("Transpose", graph("Cast", "images", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])

    def sides(x: str) -> str:
        return graph("Slice", graph("Shape", x), graph.whole(2), graph.whole(4))

    def cut(x: str, start: str, length: str) -> str:
        return graph("Slice", x, start, graph("Add", start, length), graph.whole(2, 3))

    def longest(x: str) -> str:
        return graph("ReduceMax", x, keepdims=1)

    if how.mode == "crop":
        most = graph("Mul", graph("ReduceMin", sides(x), keepdims=1), graph.whole(LONGEST))
        out = graph("Div", graph("Max", graph("Sub", sides(x), most), zero), graph.whole(2))
        x = cut(x, out, graph("Sub", sides(x), graph("Mul", out, graph.whole(2))))
        new = graph("Div", graph("Mul", sides(x), edge), graph("ReduceMin", sides(x), keepdims=1))
    elif how.mode == "squash":
        new = graph("Concat", edge, edge, axis=0)
    elif how.mode == "pad":
        share = graph(
            "Div",
            graph("Cast", graph("Mul", sides(x), size), to=TensorProto.DOUBLE),
            graph("Cast", longest(sides(x)), to=TensorProto.DOUBLE),
        )
        new = graph("Max", graph("Cast", graph("Round", share), to=TensorProto.INT64), one)
    else:
        new = None
    if new is not None:
        smooth = int(how.resample != "nearest")
        filter_ = {"mode": RESIZE[how.resample], "cubic_coeff_a": -0.5, "antialias": smooth, "exclude_outside": smooth}
        height, width = (graph("Slice", new, graph.whole(i), graph.whole(i + 1)) for i in (0, 1))
        for axis, side in ((3, width), (2, height)):  # as Pillow does, which rounds in between
            shape = graph("Shape", x)
            parts = [graph("Slice", shape, graph.whole(i), graph.whole(i + 1)) for i in range(4)]
            parts[axis] = side
            x = graph("Resize", x, "", "", graph("Concat", *parts, axis=0), **filter_)
            x = graph("Floor", graph("Add", x, graph.number(0.5)))  # `Round` would take halves to even numbers
            x = graph("Clip", x, graph.number(0.0), graph.number(255.0))
    # A smaller image gets a border, of a larger one the centre stays
    missing = graph("Max", graph("Sub", size, sides(x)), zero)
    # Pillow's centre: of an odd rest the larger half is cut off behind, and added in front, but for `pad`
    before = graph("Div", missing if how.mode == "pad" else graph("Add", missing, one), graph.whole(2))
    nothing = graph.whole(0, 0)
    border = graph("Concat", nothing, before, nothing, graph("Sub", missing, before), axis=0)
    x = graph("Pad", x, border, graph.number(float(how.fill if how.mode == "pad" else 0)))
    start = graph("Div", graph("Sub", sides(x), size), graph.whole(2))
    x = cut(x, start, graph("Concat", size, size, axis=0))
    scaled = graph("Sub", graph("Mul", x, graph.number(how.rescale)), graph.channels(how.mean))
    graph("Div", scaled, graph.channels(how.std), output="pixels")
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", "height", "width", 3])
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, how.size, how.size])
    used = {name for node in graph.nodes for name in node.input}
    constants = [constant for constant in graph.constants if constant.name in used]
    made = helper.make_graph(graph.nodes, "preprocessing", [images], [pixels], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])


class _Graph:
    """Nodes one after another, each called with the names of what goes in, and giving the name of what comes out."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind.lower()}-{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"constant-{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def whole(self, *values: int) -> str:
        return self._constant(np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        return self._constant(np.array(value, dtype=np.float32))

    def channels(self, values: Sequence[float]) -> str:
        return self._constant(np.array(values, dtype=np.float32).reshape(1, 3, 1, 1))
