"""The page of an evaluation: one file that asks for nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from cairn.reports.templates import rendered

SIDE = 112
"""Of a thumbnail, in pixels."""

MOST = 60
"""Classes of which the confusion matrix is shown; of more it would not be legible."""


def thumbnail(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def evaluation_page(
    report: Mapping[str, Any],
    pictures: Mapping[str, tuple[str, str, str]],
    learner: str,
    pairs: int,
    segmented: Sequence[Mapping[str, Any]] = (),
) -> str:
    """HTML of `Evaluation.report()`. `pictures` has for the images that are shown a thumbnail, their class and the one that they
    are taken for; `segmented` are those with what is found where in them (`MaskedPicture.told`).
    Raises ConfigError if Jinja2 is missing."""
    most = max((max(row) for row in report["confusion"]["counts"]), default=0)
    top = next(key for key in report if key.startswith("top"))
    return rendered(
        "evaluation.html.jinja",
        "--html",
        report=report,
        pictures=pictures,
        learner=learner,
        pairs=pairs,
        most=max(1, most),
        top=top,
        segmented=segmented,
        legible=MOST,
    )


def label_sets_page(report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], learner: str) -> str:
    """HTML of `LabelSetEvaluation.report()`. `pictures` are those shown: name, thumbnail, classes said, classes missing. Raises
    ConfigError if Jinja2 is missing."""
    return rendered("label_sets.html.jinja", "--html", report=report, pictures=pictures, learner=learner)
