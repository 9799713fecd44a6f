"""Where a picture shows which class: what was found, painted over the picture, beside what is there if that is known."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cairn.reports.patches import COLOURS, blank_figure, write_figure

SIDE = 224
"""Of a painted picture, in pixels."""

OTHERS = "#9a9a9a"
"""Of the classes beyond those that there are colours for."""

LINE = "#141414"
"""Between regions, which so are told apart without their colours."""


@dataclass(frozen=True)
class Region:
    """A class in a picture: its share of the area as it was found, and as it is where that is known."""

    name: str
    colour: str
    found: float
    true: float | None


@dataclass(frozen=True, eq=False)
class MaskedPicture:
    """A picture, uint8 (s, s, 3), as the tower saw it; of every pixel, of whatever size, what was `found` there and what the `truth`
    is: 0 the background, c + 1 class number c."""

    image: np.ndarray
    found: np.ndarray
    names: Sequence[str]
    truth: np.ndarray | None = None

    @cached_property
    def regions(self) -> list[Region]:
        """The classes in it, the largest first, what is true before what is not. Each has its colour; those beyond the colours
        have OTHERS."""
        shares = {c: float((self.found == c).mean()) for c in np.unique(self.found).tolist() if c}
        true = {} if self.truth is None else {c: float((self.truth == c).mean()) for c in np.unique(self.truth) if c}
        order = sorted(shares.keys() | true.keys(), key=lambda c: (-true.get(c, 0.0), -shares.get(c, 0.0), c))
        return [
            Region(
                self.names[int(c) - 1],
                COLOURS[i] if i < len(COLOURS) - 1 else OTHERS,
                shares.get(c, 0.0),
                None if self.truth is None else true.get(c, 0.0),
            )
            for i, c in enumerate(order)
        ]

    @property
    def panels(self) -> dict[str, np.ndarray]:
        """The picture, and it under what was found and under what is there, by what each is called; uint8 (SIDE, SIDE, 3)."""
        shown = np.asarray(Image.fromarray(self.image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        found = {"picture": shown, "found": self._painted(shown, self.found)}
        return found if self.truth is None else found | {"true": self._painted(shown, self.truth)}

    def _painted(self, shown: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The picture in grey, regions in their colours, lines where they meet."""
        mask = np.asarray(Image.fromarray(mask.astype(np.int32)).resize((SIDE, SIDE), Image.Resampling.NEAREST))
        colours = {one.name: _rgb(one.colour) for one in self.regions}
        grey = np.repeat(shown.mean(2, keepdims=True), 3, 2)
        painted = 0.35 * grey + 70
        for c in np.unique(mask).tolist():
            if c:
                painted[mask == c] = 0.4 * grey[mask == c] + 0.6 * colours[self.names[int(c) - 1]]
        edge = np.zeros(mask.shape, dtype=bool)
        edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        edge[1:] |= mask[1:] != mask[:-1]
        edge[:-1] |= edge[1:]
        edge[:, :-1] |= edge[:, 1:]
        painted[edge] = _rgb(LINE)
        return painted.clip(0, 255).astype(np.uint8)

    def told(self) -> dict[str, Any]:
        """As JSON and pages hold it: panels as addresses that hold them, and the regions."""
        return {
            "panels": {name: png_address(panel) for name, panel in self.panels.items()},
            "regions": [vars(one) for one in self.regions],
        }


def png_address(image: np.ndarray) -> str:
    """An image as an address that holds it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def transparent_address(picture: MaskedPicture) -> str:
    """What was found, to be laid over the picture: regions in their colours, the background clear."""
    found = picture.found
    layer = np.zeros((*found.shape, 4), dtype=np.uint8)
    colours = {one.name: _rgb(one.colour) for one in picture.regions}
    for c in np.unique(found).tolist():
        if c:
            layer[found == c] = [*colours[picture.names[int(c) - 1]], 165]
    return png_address(layer)


def mask_figure(picture: MaskedPicture, path: Path) -> None:
    """The panels beside one another, the classes below. Raises ConfigError if matplotlib is missing."""
    panels = picture.panels
    figure = blank_figure(figsize=(3.1 * len(panels), 4.2))
    from matplotlib.patches import Patch

    for axis, (name, panel) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axis.imshow(panel)
        axis.set_axis_off()
        axis.set_title(name, fontsize=10)
    handles = [
        Patch(facecolor=one.colour, edgecolor="black", linewidth=0.5, label=f"{one.name}: {_shares(one)}")
        for one in picture.regions[: len(COLOURS)]
    ]
    legend = figure.legend(handles=handles, loc="outside lower left", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_figure(figure, path, dpi=130)


def _shares(one: Region) -> str:
    true = "" if one.true is None else f", {100 * one.true:.0f} % true"
    return f"{100 * one.found:.0f} % of the picture{true}"


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], dtype=np.float64)
