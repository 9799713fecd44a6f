"""What cairn is called where packages are installed. The index has another project called `cairn`."""

from __future__ import annotations

from importlib import metadata

NAME = "cairn-cil"
_FORMER = "cairn"


def installed_version() -> str:
    """Of this package, also where it was installed under the name that it had before."""
    try:
        return metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return metadata.version(_FORMER)


def extra_remedy(extra: str) -> str:
    """How to install what an extra brings, as the end of a message."""
    wheel = f"{NAME.replace('-', '_')}-{installed_version()}-py3-none-any.whl"
    return f'pip install ".[{extra}]" in a clone of cairn, or pip install "{wheel}[{extra}]" beside its wheel'
