"""Pictures of what was found where: regions, colours, lines, and the forms they are shown in."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from cairn.errors import ResultError
from cairn.reports.masks import LINE, OTHERS, SIDE, MaskedPicture, mask_figure, transparent_address
from cairn.reports.patches import COLOURS, bar_figure, blank_figure, write_figure

NAMES = [f"class {c}" for c in range(12)]


def picture(found, truth=None):
    return MaskedPicture(np.full((56, 56, 3), 128, dtype=np.uint8), np.asarray(found), NAMES, truth)


def halves():
    """Left half class 2, right half background; in truth the upper quarter of all is class 5."""
    found, truth = np.zeros((8, 8), dtype=np.int64), np.zeros((4, 4), dtype=np.int64)
    found[:, :4], truth[0] = 3, 6
    return picture(found, truth)


def opened(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))


def test_regions_are_the_classes_with_their_shares_what_is_true_first():
    first, second = halves().regions
    assert (first.name, first.found, first.true, first.colour) == ("class 5", 0.0, 0.25, COLOURS[0])
    assert (second.name, second.found, second.true, second.colour) == ("class 2", 0.5, 0.0, COLOURS[1])
    assert picture(np.zeros((4, 4), dtype=np.int64)).regions == []
    assert [one.true for one in picture(np.eye(4, dtype=np.int64)).regions] == [None]


def test_regions_have_their_colours_and_lines_between():
    panels = halves().panels
    assert [*panels] == ["picture", "found", "true"]
    assert all(panel.shape == (SIDE, SIDE, 3) for panel in panels.values())
    grey = 0.4 * 128 + 0.6 * np.array([0x56, 0xB4, 0xE9])
    assert panels["found"][10, 10] == pytest.approx(grey, abs=1)
    assert panels["found"][10, SIDE - 10] == pytest.approx(0.35 * 128 + 70, abs=1)
    assert tuple(panels["found"][10, SIDE // 2]) == tuple(int(LINE[at : at + 2], 16) for at in (1, 3, 5))


def test_classes_beyond_the_colours_share_one():
    regions = picture(np.arange(12).reshape(3, 4) + 1).regions
    assert [one.colour for one in regions] == [*COLOURS[:7], *[OTHERS] * 5]


def test_the_layer_is_clear_where_the_background_is():
    layer = opened(transparent_address(halves()))
    assert layer.shape == (8, 8, 4)
    assert layer[0, 0].tolist() == [0x56, 0xB4, 0xE9, 165]
    assert layer[0, 7, 3] == 0
    told = halves().told()
    assert np.array_equal(opened(told["panels"]["found"]), halves().panels["found"])
    assert told["regions"][1] == {"name": "class 2", "colour": COLOURS[1], "found": 0.5, "true": 0.0}


def test_a_figure_has_a_panel_each(tmp_path):
    mask_figure(halves(), tmp_path / "three.png")
    mask_figure(picture(np.eye(4, dtype=np.int64)), tmp_path / "two.png")
    with Image.open(tmp_path / "three.png") as wide, Image.open(tmp_path / "two.png") as narrow:
        assert wide.width == pytest.approx(1.5 * narrow.width, abs=2)


def test_a_figure_that_does_not_fit_on_the_disk_is_one_error_and_leaves_the_old_one(tmp_path, small_files):
    """Of every kind that is drawn: a file that is cut off would be taken for a picture."""
    grey, reasons = np.full((56, 56, 3), 128, dtype=np.uint8), [{"name": "a", "probability": 0.7}]
    drawn = {
        "masks": lambda path: mask_figure(halves(), path),
        "bars": lambda path: bar_figure(grey, reasons, path),
        "plain": lambda path: write_figure(blank_figure(figsize=(3, 2)), path, dpi=100),
    }
    for name, draw in drawn.items():
        path = tmp_path / f"{name}.png"
        draw(path)
        before = path.read_bytes()
        with small_files(500), pytest.raises(ResultError, match=f"{name}.png': cannot be written"):
            draw(path)
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == len(drawn)
