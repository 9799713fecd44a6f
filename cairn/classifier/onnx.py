"""A learner as one ONNX file: pixels in, scores out, for places without Python."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cairn.classifier.classifier import IncrementalClassifier
from cairn.errors import ConfigError, ResultError
from cairn.maths.similarity import unit
from cairn.methods.catalogue import METHODS
from cairn.methods.protocol import CosineScoring
from cairn.storage.distribution import extra_remedy
from cairn.storage.files import atomic_write

TOLERANCE = 1e-4
"""Largest difference of a score that is let pass, relative to the largest score."""

CHECKED = 8
"""Random images on which the file is compared before it is kept."""


class ImageScores(nn.Module):
    """scores(x) = s cos(f(x), t_c) of prepared pixels, with f and t as they were learned."""

    texts: Tensor

    def __init__(self, vision: nn.Module, texts: Tensor, s: float):
        super().__init__()
        self.vision = vision
        self.register_buffer("texts", s * texts)

    def forward(self, pixels: Tensor) -> Tensor:
        return unit(self.vision(pixels)) @ self.texts.T


def image_scores(learner: IncrementalClassifier) -> ImageScores:
    """The image tower and the class matrix. Raises ConfigError for a method whose scores are not such a product, and for
    features files, which have no tower."""
    method = learner.method_
    if method is None:
        raise ConfigError("nothing was learned yet: there is nothing to export")
    towers = method.towers
    if not towers.has_images:
        raise ConfigError("learned from embeddings: there is no image tower to export")
    if not isinstance(method, CosineScoring):
        able = ", ".join(name for name, entry in METHODS.items() if CosineScoring in entry.capabilities)
        raise ConfigError(
            f"method '{learner.method}': its scores are not cosines of an image embedding and class vectors, so it cannot be "
            f"exported; these can: {able}"
        )
    form = method.cosine_form()
    return ImageScores(form.vision.cpu().float().eval(), form.matrix.detach().cpu().float(), towers.logit_scale)


def export_onnx(learner: IncrementalClassifier, path: Path) -> float:
    """Write the file, with class names and preprocessing in its metadata; the largest difference found, relative to the
    largest score.

    Raises ConfigError if the packages are missing, ResultError if onnxruntime's scores are not the learner's within
    TOLERANCE; the file is then not kept.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch writes the file with
    except ImportError as error:
        raise ConfigError(f"export: {error.name} is missing; {extra_remedy('onnx')}") from None
    model, towers = image_scores(learner), learner.method_.towers
    rng = np.random.default_rng(0)
    size = towers.prepare(np.zeros((8, 8, 3), np.uint8)).shape[-1]
    images = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(CHECKED)]
    pixels = towers.pixels(torch.stack([towers.prepare(image) for image in images])).cpu().float()
    with atomic_write(path) as temporary:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what it says of torchvision, which nothing here uses
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program = torch.onnx.export(
                model,
                (pixels,),
                input_names=["pixels"],
                output_names=["scores"],
                dynamo=True,
                verbose=False,
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            )
        if program is None:
            raise ResultError(f"'{path}': torch wrote no program")
        proto = program.model_proto
        preprocessing = towers.preprocessing.model_dump(mode="json") if towers.preprocessing else {}
        about = {
            "classes": list(map(str, learner.classes_)),
            "preprocessing": preprocessing,
            "method": learner.method,
            "towers": towers.fingerprint,
        }
        onnx.helper.set_model_props(proto, {f"cairn.{key}": json.dumps(value) for key, value in about.items()})
        onnx.save(proto, temporary)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        found = session.run(["scores"], {"pixels": pixels.numpy()})[0]
        expected = learner.predictions(images).scores.numpy()
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not difference <= TOLERANCE:
            raise ResultError(f"'{path}': scores differ by {difference:.1e} from the learner's; nothing was kept")
    return difference
