"""The patches behind a prediction, drawn over the image, with the sentences they were transported to."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cairn.errors import ConfigError
from cairn.storage.distribution import extra_remedy
from cairn.storage.files import write_chunks

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")
"""Told apart by colour-blind readers; one per sentence, the rest share the last."""


def patch_figure(image: np.ndarray, grid: int, reasons: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per class: the image (h x w x 3, as the tower saw it), its chosen patches framed in their sentence's colour.

    The rest of the image is dimmed. Below, the sentences that patches went to, with their share of the local score.
    Raises ConfigError if matplotlib is missing.
    """
    figure = blank_figure(figsize=(3.6 * len(reasons), 5.2))
    from matplotlib.patches import Patch, Rectangle

    height, width = image.shape[0] / grid, image.shape[1] / grid
    for axis, reason in zip(np.atleast_1d(figure.subplots(1, len(reasons))), reasons, strict=True):
        shares: dict[str, float] = {}
        for patch in reason["patches"]:
            shares[patch["sentence"]] = shares.get(patch["sentence"], 0.0) + patch["share"]
        order = sorted(shares, key=lambda sentence: -shares[sentence])
        colour = {sentence: COLOURS[min(i, len(COLOURS) - 1)] for i, sentence in enumerate(order)}
        chosen = np.zeros(image.shape[:2], dtype=bool)
        for patch in reason["patches"]:
            row, column = divmod(patch["patch"], grid)
            top, left = row * height, column * width
            chosen[round(top) : round(top + height), round(left) : round(left + width)] = True
            axis.add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5),
                    width,
                    height,
                    fill=False,
                    linewidth=1.6,
                    edgecolor=colour[patch["sentence"]],
                )
            )
        axis.imshow(np.where(chosen[..., None], image, (0.35 * image + 70).astype(np.uint8)))
        axis.set_axis_off()
        axis.set_title(f"{reason['name']}\nscore {reason['score']:.1f}", fontsize=10, parse_math=False)
        handles = [
            Patch(facecolor=colour[s], edgecolor="black", linewidth=0.5, label=f"{100 * shares[s]:.0f} %  {s}")
            for s in order
        ]
        legend = axis.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=8, frameon=False
        )
        for text in legend.get_texts():  # a sentence is text, whatever signs it has
            text.set_parse_math(False)
    write_figure(figure, path, dpi=130)


def bar_figure(image: np.ndarray, reasons: Sequence[dict[str, Any]], path: Path) -> None:
    """The image (h x w x 3) beside its likeliest classes, with their probabilities as bars.

    Raises ConfigError if matplotlib is missing.
    """
    figure = blank_figure(figsize=(7.2, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(image)
    left.set_axis_off()
    rows = range(len(reasons))
    right.barh(rows, [100 * reason["probability"] for reason in reasons], color=COLOURS[1])
    for row, reason in zip(rows, reasons, strict=True):
        right.text(1, row, f"{reason['name']}  {100 * reason['probability']:.1f} %", va="center", parse_math=False)
    right.set(xlim=(0, 100), xlabel="probability, %", yticks=[])
    right.invert_yaxis()
    write_figure(figure, path, dpi=130)


def blank_figure(**how: Any) -> Any:
    """Raises ConfigError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"figure: matplotlib is missing; {extra_remedy('report')}") from None
    return Figure(layout="constrained", **how)


def write_figure(figure: Any, path: Path, dpi: int) -> None:
    """The figure in the format of the path's ending, whole or not at all. Raises ResultError if it cannot be written."""
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:], dpi=dpi)
    write_chunks(path, [file.getvalue()])
