"""Pictures sorted into a folder per class, and a folder that is watched."""

from __future__ import annotations

import os
import threading
import time

import pytest
from PIL import Image

from cairn.data.sorting import SortedFolder, folder_name
from cairn.data.watching import new_pictures
from cairn.errors import DataError, ResultError


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, 0, 0)).save(path)
    return path


@pytest.mark.parametrize("how", ["link", "copy"])
def test_each_class_has_a_folder_and_nothing_is_overwritten(tmp_path, how):
    one, other = picture(tmp_path / "a" / "1.png"), picture(tmp_path / "b" / "1.png", 9)
    sorted_folder = SortedFolder(tmp_path / "out", how)
    places = [sorted_folder.put(*item) for item in ((one, "cat"), (other, "cat"), (one, None), (one, "cat"))]
    assert [place.relative_to(tmp_path / "out").as_posix() for place in places] == [
        "cat/1.png",
        "cat/1-2.png",
        "unknown/1.png",
        "cat/1.png",
    ]
    assert [place.read_bytes() == one.read_bytes() for place in places] == [True, False, True, True]
    assert {place.is_symlink() for place in places} == {how == "link"}
    assert sorted_folder.summary() == "2 folders: cat 3, unknown 1"


def test_no_two_classes_share_a_folder_and_none_leaves_it(tmp_path):
    names = ["a/b", "a%2Fb", "a\\b", "..", ".", ".cat", "cat.", "cat ", "cat", "unknown", "tea: pot", "äöü"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert (tmp_path / folder).resolve().parent == tmp_path
        assert folder not in (".", "..", "unknown")
    assert folder_name("tea cup") == "tea cup"


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot be written"):
        SortedFolder(tmp_path / "file").put(picture(tmp_path / "1.png"), "cat")


def test_a_watched_folder_hands_out_each_picture_once_and_whole(tmp_path):
    picture(tmp_path / "in" / "1.png")
    picture(tmp_path / "in" / "known.png")
    growing = tmp_path / "in" / "deep" / "2.png"
    found = new_pictures(tmp_path / "in", [tmp_path / "in" / "known.png"], seconds=0.05)
    assert [path.name for path in next(found)] == ["1.png"]

    def write():
        growing.parent.mkdir()
        with growing.open("wb") as file:
            for _ in range(8):  # longer than two looks
                file.write(b"x" * 100)
                file.flush()
                os.fsync(file.fileno())
                time.sleep(0.03)

    writer = threading.Thread(target=write)
    writer.start()
    (path,) = next(found)
    assert path == growing
    assert path.stat().st_size == 800
    writer.join()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder to watch"):
        next(new_pictures(tmp_path / "nowhere"))
