"""Metadata of a features file: the schema of the texts that stand beside its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cairn.data.names import normal_form, text_problem
from cairn.data.templates import DEFAULT, template_problem
from cairn.errors import DataError
from cairn.storage.files import parsed_json
from cairn.storage.schema import first_problem

KEYS = {
    "class_names": ("class_names", "classnames", "classes", "names"),
    "templates": ("templates", "template"),
    "logit_scale": ("logit_scale",),
    "model": ("model", "backbone", "towers"),
}
"""Keys under which each field is looked for, in this order."""


def _json_or_none(text: str, beginning: str) -> Any:
    """The value of a JSON text, None for a text that is none. Raises ValueError for a damaged one: it has such a beginning."""
    try:
        return parsed_json(text.encode())
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] in beginning:
            raise ValueError(f"must be JSON as it begins, but {type(error).__name__}: {error}") from None
        return None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _names(text: str) -> list[Any]:
    """Class names from a JSON list, from a JSON object between names and numbers 0..k-1, or one name per line."""
    value = _json_or_none(text, '[{"')
    if value is None:
        return _lines(text)
    if isinstance(value, dict):
        if all(isinstance(name, str) for name in value.values()):
            value = {name: number for number, name in value.items()}
        numbers = {int(number): name for name, number in value.items() if _is_small(str(number))}
        if sorted(numbers) != list(range(len(value))):
            raise ValueError("must number its names from 0, each once")
        return [numbers[i] for i in range(len(numbers))]
    if not isinstance(value, list):
        raise ValueError("must be a list of names")
    return value


def _is_small(number: str) -> bool:
    return number.isdecimal() and len(number) < 10


def _templates(text: str) -> list[Any]:
    """Templates from a JSON list, one from a JSON string, or one per line."""
    value = _json_or_none(text, '["')
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) else _lines(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _class_name(name: str) -> str:
    kept = normal_form(name)
    if not kept:
        raise ValueError("must have a visible character")
    return _text(kept)


def _template(template: str) -> str:
    if problem := template_problem(template):
        raise ValueError(problem)
    return _text(template)


def _text(text: str) -> str:
    if problem := text_problem(text):
        raise ValueError(problem)
    return text


def _different(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"class name '{Counter(names).most_common(1)[0][0]}' appears twice")
    return names


ClassName = Annotated[str, AfterValidator(_class_name)]
Template = Annotated[str, AfterValidator(_template)]


class FeaturesMetadata(BaseModel):
    """What is read of the metadata. Keys beside these are other programs' own and are passed over.

    A field's description is the remedy for a value that is refused.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    class_names: Annotated[
        list[ClassName], Field(min_length=1), AfterValidator(_different), BeforeValidator(_names)
    ] = Field(
        validation_alias=AliasChoices(*KEYS["class_names"]),
        description="a JSON list of different names",
    )
    templates: Annotated[list[Template], Field(min_length=1), BeforeValidator(_templates)] = Field(
        default=list(DEFAULT),
        validation_alias=AliasChoices(*KEYS["templates"]),
        description="a JSON list of texts with {} once in each, in place of the class name",
    )
    logit_scale: Annotated[float, Field(ge=1e-3, le=1e6), BeforeValidator(_number)] = Field(
        default=100.0, description="the factor on cosines, exp(logit_scale) of the model (CLIP's is 100)"
    )
    model: Annotated[str, Field(max_length=500), AfterValidator(_text)] | None = Field(
        default=None,
        validation_alias=AliasChoices(*KEYS["model"]),
        description="the name of the model that made the embeddings",
    )

    @classmethod
    def parsed(cls, metadata: Mapping[str, str], where: str) -> FeaturesMetadata:
        """From the texts of a file; empty ones count as left out. Raises DataError, its message beginning with `where`."""
        try:
            return cls.model_validate({key: text for key, text in metadata.items() if text.strip()})
        except ValidationError as error:
            key = error.errors()[0]["loc"][0]
            field = next(name for name, keys in KEYS.items() if key in keys)
            remedy = f"store {cls.model_fields[field].description} under '{field}'"
            raise DataError(f"{where}: metadata {first_problem(error)}; {remedy}") from None
