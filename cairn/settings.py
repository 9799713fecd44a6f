"""What settings of a method are: a frozen pydantic model. How they are given and printed is in `cairn.config`."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings of a method, or some of them: frozen, and an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def alters_images(self) -> bool:
        """Whether with these settings other images than the given ones pass the tower."""
        return False

    @classmethod
    def embedding(cls) -> Self:
        """The defaults on precomputed embeddings."""
        return cls()


class NoSettings(Settings):
    """Of a method that has none."""


def kind_by_name(value: Any) -> Any:
    """A choice may be given by its kind alone: 'lora' for {'kind': 'lora'}."""
    return {"kind": value} if isinstance(value, str) else value
