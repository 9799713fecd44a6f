"""Settings of a method, changed by `a.b=value`, printed with defaults and origins."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cairn.errors import ConfigError, UnknownName
from cairn.settings import NoSettings as NoSettings
from cairn.settings import Settings as Settings
from cairn.settings import kind_by_name as kind_by_name
from cairn.storage.files import read_yaml
from cairn.storage.schema import reason_of

Model = TypeVar("Model", bound=BaseModel)


def choices(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The classes a setting chooses among, by kind; empty if it is a plain value."""
    annotation = field.annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    found = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel) and "kind" in m.model_fields]
    return {m.model_fields["kind"].default: m for m in found}


def settings(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting as (path, value, description), choices by their kind, depth first."""
    for name, field in type(config).model_fields.items():
        value, path = getattr(config, name), f"{prefix}{name}"
        if name == "kind":
            continue
        if isinstance(value, BaseModel):
            if kinds := choices(field):
                kind = next(kind for kind, choice in kinds.items() if choice is type(value))
                yield path, kind, field.description or " | ".join(kinds)
            yield from settings(value, f"{path}.")
        else:
            yield path, value, field.description or ""


def with_settings(config: Model, given: Mapping[str, Any] | Sequence[str]) -> Model:
    """`with_values` of values by path, or of texts `path=value` as on the command line."""
    return with_values(config, given.items() if isinstance(given, Mapping) else parsed(given))


def parsed(assignments: Sequence[str]) -> list[tuple[str, Any]]:
    """Path and value of each `path=value` of the command line; values are YAML scalars. Raises ConfigError for what is not of
    that form."""
    found = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {assignment}: must be key=value, e.g. stage1.schedule.epochs=4")
        try:
            value = read_yaml(text) if text else ""
        except ValueError:
            value = text
        if isinstance(value, str) and _is_number(value):
            value = float(value)
        elif not isinstance(value, str | int | float | list | dict | None):  # a date
            value = text
        found.append((path.strip(), value))
    return found


def values_by_path(given: Any) -> dict[str, Any]:
    """Settings as a RunConfig holds them: JSON values by path, in the order in which they are applied.

    `given` is a table, of which tables within are parts of a path, or, as older results have it, texts `path=value`. Raises
    ValueError.
    """
    if isinstance(given, Mapping):
        return merged({}, _leaves(given))
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise ValueError("must be a table of settings")
    try:
        return merged({}, parsed(given))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A choice comes before what it has to set."""
    for key, value in sorted(table.items(), key=lambda item: item[0] != "kind"):
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            value = value.item() if isinstance(value, np.generic) else value
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def merged(values: Mapping[str, Any], more: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Settings and further ones, which go before. Of a choice that is made anew, what was set of the one before is dropped."""
    found = dict(values)
    for path, value in more:
        if path in found and found[path] != value:
            found = {other: kept for other, kept in found.items() if not f"{other}.".startswith(f"{path}.")}
        found[path] = value
    return found


def texts(values: Mapping[str, Any]) -> list[str]:
    """The settings as texts that may stand after --set."""
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in values.items()]


def with_values(config: Model, values: Iterable[tuple[str, Any]]) -> Model:
    """The config with each value, of the setting's own type, at its path, in order.

    Raises UnknownName for an unknown path (with the nearest ones) and ConfigError for a value that does not fit.
    """
    for path, value in values:
        value = value.item() if isinstance(value, np.generic) else value
        config = _assigned(config, path.split("."), value, path, config)
    for path, value, _ in settings(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"setting {path}={value}: must be a finite number")
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise ConfigError(f"setting {path}={value}: must be UTF-8")
    return config


def _assigned(node: BaseModel, keys: list[str], value: Any, path: str, root: BaseModel) -> Any:
    name, *rest = keys
    if name not in type(node).model_fields:
        raise UnknownName("setting", path, _paths(root))
    field, current = type(node).model_fields[name], getattr(node, name)
    kinds = choices(field)
    if rest:
        if not isinstance(current, BaseModel):
            raise UnknownName("setting", path, _paths(root))
        if rest == ["kind"] and kinds:
            return _assigned(node, [name], value, path, root)
        value = _assigned(current, rest, value, path, root)
    elif kinds and isinstance(value, str):
        if value not in kinds:
            raise UnknownName(f"{path}", value, kinds)
        value = current if current is not None and current.kind == value else kinds[value]()
    try:
        given = {key: getattr(node, key) for key in node.model_fields_set}
        return type(node).model_validate(given | {name: value})
    except ValidationError as error:
        raise ConfigError(f"setting {path}={value}: {reason_of(error.errors()[0])}") from None


def _paths(root: BaseModel) -> list[str]:
    return [path for path, _, _ in settings(root)]


def _is_number(text: str) -> bool:
    """YAML 1.1 takes 1e-3 for a word."""
    try:
        float(text)
    except ValueError:
        return False
    return True
