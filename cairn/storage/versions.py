"""What a result depends on besides its settings."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

from cairn.storage.distribution import installed_version

PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Of cairn, of what it stands on, of Python and of the system."""
    found = {"cairn": installed_version()} | {name: metadata.version(name) for name in PACKAGES}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def changes(then: Mapping[str, str]) -> str:
    """What is of another version today, in words; empty where nothing is."""
    return ", ".join(f"{key} {then.get(key)} -> {now}" for key, now in versions().items() if then.get(key) != now)
