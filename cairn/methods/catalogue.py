"""The methods there are, by name: one module each in this folder, and those of other packages.

Another package brings a method by an entry point of the group `cairn.methods`, whose name is the method's and whose value
its class, `NAME = "package.module:Class"`. An entry point that cannot be used is told in one line and left out.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeGuard

from cairn import methods
from cairn.errors import UnknownName, one_line
from cairn.methods.protocol import CAPABILITIES, Card, DescribedClasses, Method
from cairn.settings import Settings
from cairn.towers.protocol import Towers

GROUP = "cairn.methods"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A method's name and its class, which is called as `build(towers, config, seed=...)`."""

    name: str
    build: type[Method]

    @property
    def card(self) -> Card:
        return self.build.card

    @property
    def capabilities(self) -> tuple[type, ...]:
        """Those of `CAPABILITIES` that the method has."""
        return tuple(kind for kind in CAPABILITIES if issubclass(self.build, kind))

    @property
    def uses(self) -> tuple[str, ...]:
        """What else the method needs or does, in words."""
        claims = {
            "text": self.card.text,
            "descriptions": DescribedClasses in self.capabilities,
            "moves the encoder": self.card.moves,
        }
        return tuple(what for what, holds in claims.items() if holds)

    @property
    def config(self) -> type[Settings]:
        return self.card.config

    def default_config(self, towers: Towers) -> Settings:
        return self.config() if towers.has_images else self.config.embedding()

    @property
    def has_embedding_form(self) -> bool:
        """Whether the settings have other defaults on precomputed embeddings."""
        return self.config.embedding() != self.config()

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a learner's record holds, all there were, with `Card.older` for those that came later and without
        `Card.former`."""
        return _completed(_without(config, self.card.former), self.card.older)


def _without(config: Mapping[str, Any], former: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the values, at whatever depth, that `former` has too."""
    return {
        key: _without(value, former[key])
        if isinstance(value, Mapping) and isinstance(former.get(key), Mapping)
        else value
        for key, value in config.items()
        if key not in former or isinstance(value, Mapping) or value != former[key]
    }


def _completed(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """`config` and, at whatever depth, what `older` has and it has not."""
    nested = {
        key: _completed(config[key], value)
        for key, value in older.items()
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping)
    }
    return {**older, **config, **nested}


class Methods(Mapping[str, Entry]):
    """Own methods in the order of their names, then those of other packages. Imported is what is asked for."""

    def __getitem__(self, name: str) -> Entry:
        module = _modules().get(name)
        return (_own(module) if module else None) or _others()[name]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name, module in _modules().items() if _own(module))
        yield from _others()

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _modules() -> dict[str, str]:
    """The modules of this folder, by the name of the method that each may hold."""
    found = sorted(module.name for module in pkgutil.iter_modules(methods.__path__) if not module.ispkg)
    return {name.replace("_", "-"): name for name in found}


@cache
def _own(module: str) -> Entry | None:
    """The method that a module of this folder defines, if it does."""
    home = importlib.import_module(f"{methods.__name__}.{module}")
    found = [value for value in vars(home).values() if _is_method(value) and value.__module__ == home.__name__]
    return Entry(module.replace("_", "-"), found[0]) if found else None


@cache
def _others() -> dict[str, Entry]:
    """The methods of other packages."""
    found: dict[str, Entry] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            method = point.load()
            if not _is_method(method):
                raise TypeError("it is no class with a Card named card")
            if point.name in _modules() or point.name in found:
                raise ValueError("the name is taken")
        except Exception as error:  # of somebody else's code
            package = point.dist.name if point.dist else "?"
            reason = one_line(f"{type(error).__name__}: {error}")
            log.warning("method '%s' of the package '%s' is left out: %s", one_line(point.name), package, reason)
        else:
            found[point.name] = Entry(point.name, method)
    return found


def _is_method(value: object) -> TypeGuard[type[Method]]:
    return isinstance(value, type) and isinstance(vars(value).get("card"), Card)


METHODS = Methods()


def method_named(name: str) -> Entry:
    """Raises UnknownName with the nearest names."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]
