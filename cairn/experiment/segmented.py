"""Pictures of what a run found in its test images, where it segments them: kept beside the result, for a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cairn.data.images import Images
from cairn.experiment.run import Outcome
from cairn.experiment.schema import SCHEMA_VERSION, SEGMENTED
from cairn.maths.overlap import pixel_classes
from cairn.methods.protocol import Segments
from cairn.reports.masks import SIDE, MaskedPicture
from cairn.storage.files import write_json
from cairn.towers.cached import opened
from cairn.towers.masks import mask_in_view

SHOWN = 8
"""Pictures, of as many classes."""


def write_segmented(folder: Path, outcome: Outcome) -> None:
    """As `segmented.json`: the first test image of SHOWN classes, spread evenly over the order of arrival, with what the method finds
    in it after the last task. Nothing where it does not segment, or masks are not known."""
    tests, names = outcome.stream.tests, outcome.stream.class_names
    if not isinstance(outcome.method, Segments) or mask_in_view(tests[0], 0, outcome.towers) is None:
        return
    shown = []
    for c in np.unique(np.linspace(0, len(names) - 1, SHOWN).round().astype(int)).tolist():
        place = next(((images, row) for images in tests for row in np.flatnonzero(images.labels == c)[:1]), None)
        if place is not None and (picture := _picture(outcome, *place)) is not None:
            shown.append({"class": names[c], **picture.told()})
    write_json(folder / SEGMENTED, {"schema_version": SCHEMA_VERSION, "pictures": shown})


def _picture(outcome: Outcome, images: Images, row: int) -> MaskedPicture | None:
    method, towers, label = outcome.method, outcome.towers, int(images.labels[row])
    assert isinstance(method, Segments)
    mask = mask_in_view(images, row, towers)
    if mask is None:
        return None
    source, place = opened(images, row)
    seen = towers.prepare(source[place])
    q = method.segment(method.embed(method.towers.pixels(seen[None])))
    return MaskedPicture(
        seen.permute(1, 2, 0).numpy(),
        pixel_classes(q, SIDE, SIDE)[0].cpu().numpy(),
        outcome.stream.class_names,
        np.where(mask, label + 1, 0),
    )
