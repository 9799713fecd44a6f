"""Prompt templates: texts with one `{}` for the class name."""

from __future__ import annotations

from collections.abc import Iterable

from cairn.errors import CairnError, ConfigError

DEFAULT = ("a photo of a {}.",)


def template_problem(template: object) -> str | None:
    """What is wrong with a template, if anything: `{label}`, for one, would give every class the same prompt."""
    if not isinstance(template, str):
        return f"must be a text, such as '{DEFAULT[0]}'"
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        return "must hold {} once, in place of the class name, and no other brace"
    return None


def prompt_templates(
    given: Iterable[str] | str, where: str = "templates", error: type[CairnError] = ConfigError
) -> tuple[str, ...]:
    """The templates as a tuple; a single text is one template. The check for every place where templates enter.

    Raises `error`, its message beginning with `where`, if there is none or one has a `template_problem`.
    """
    templates = (given,) if isinstance(given, str) else tuple(given)
    if not templates:
        raise error(f"{where}: give at least one, such as '{DEFAULT[0]}'")
    for template in templates:
        if problem := template_problem(template):
            raise error(f"{where}: '{template}' {problem}")
    return templates


def spoken(name: str) -> str:
    """A class name as it is said in a prompt: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def filled(template: str, name: str) -> str:
    """The template with the spoken name; braces in a name stay what they are."""
    return template.replace("{}", spoken(name))
