"""Where a checkpoint lies: in a folder, in the local cache of the hub, or on the hub, which is asked last."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cairn.errors import TowersError, first_line

SECONDS = 10
"""How long the hub may take to say what a repository holds."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Location:
    """A checkpoint's folder and, where that is a copy of the hub's, its commit."""

    folder: Path
    commit: str | None = None


def find_checkpoint(
    source: str,
    revision: str | None,
    marks: Sequence[str],
    chosen: Callable[[Sequence[str]], Sequence[str]],
    complete: Callable[[Path], bool],
) -> Location:
    """The folder `source`, or that of the hub's repository `source` at `revision`, a branch, tag or commit.

    A cached copy, found by one of the files `marks`, is taken as it is if it is `complete`, without any look at the hub.
    Otherwise those of the repository's files that are `chosen` are fetched. Raises TowersError for a path that does not
    exist, which is never looked for on the hub, and for what can be neither found nor fetched.
    """
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):  # false, too, for what no path can be
        if revision is not None:
            raise TowersError(f"revision '{revision}' of the folder '{source}': a folder has none; leave it out")
        return Location(Path(folder))
    if not _HUB_ID.fullmatch(source):
        raise TowersError(f"'{source}': no such folder; give the path of one, or an id of the hub, OWNER/NAME")
    import huggingface_hub

    for mark in marks:
        cached = huggingface_hub.try_to_load_from_cache(source, mark, revision=revision)
        if isinstance(cached, str) and complete(place := Path(cached).parent):
            return Location(place, place.name)
    try:
        about = huggingface_hub.HfApi().model_info(source, revision=revision, timeout=SECONDS)
        names = list(chosen([file.rfilename for file in about.siblings or ()]))
        fetched = huggingface_hub.snapshot_download(source, revision=about.sha, allow_patterns=names)
    except Exception as error:  # a hub can fail in many ways; none may reach a user as a traceback
        raise TowersError(
            f"'{source}' is no folder, not in the cache, and cannot be fetched from the hub: {first_line(error)}; check its "
            "spelling, or give the folder of a checkpoint"
        ) from None
    return Location(Path(fetched), about.sha)


def safetensors_conversion(source: str) -> str | None:
    """The hub's own conversion of a repository that holds pickled weights alone, as a revision; None without one."""
    from huggingface_hub import HfApi
    from transformers.safetensors_conversion import get_conversion_pr_reference

    try:
        return get_conversion_pr_reference(HfApi(), source)
    except Exception:  # of the hub, or of the service that converts
        return None
