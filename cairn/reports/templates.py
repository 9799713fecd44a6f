"""Pages from the templates in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cairn.errors import ConfigError
from cairn.storage.distribution import extra_remedy


def rendered(template: str, what: str, **values: Any) -> str:
    """The template's text with these values, escaped. Raises ConfigError, naming `what` was asked for, if Jinja2 is missing."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ConfigError(f"{what}: jinja2 is missing; {extra_remedy('report')}") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
