"""Visual descriptions from a vision language model: guide images and an instruction in, checked sentences out.

Any server that speaks the OpenAI chat protocol will do; key and address come from the environment (OPENAI_API_KEY,
OPENAI_BASE_URL) or from the caller. Source: SPA (arXiv 2605.13835) for guide images and for who describes [P]; the
instruction, the checks and the numbers are ours.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import Field

from cairn.data.descriptions import ClassDescription
from cairn.data.folders import named_unreadable, unreadable
from cairn.data.images import Dataset, showing, taken
from cairn.data.loading import Loader
from cairn.data.templates import spoken
from cairn.errors import CairnError, ConfigError, UnreadableImages, counted, one_line
from cairn.maths.similarity import representative_and_diverse
from cairn.settings import Given
from cairn.storage.distribution import extra_remedy
from cairn.towers.protocol import Towers
from cairn.training.context import Log
from cairn.training.encode import encode

KEPT_SIZE = 512
"""Longer side of a guide image as it is sent, in pixels."""


class DescribeConfig(Given):
    """What is asked, and of whom."""

    model: str = Field(default="gpt-5", description="a vision language model")
    sentences: int = Field(default=6, ge=1, le=64, description="sentences per class")
    words: int = Field(default=15, ge=2, le=60, description="words per sentence at most")
    name_free: bool = Field(default=True, description="sentences may not contain the class name")
    representative: int = Field(default=4, ge=0, description="guide images nearest to the class mean")
    diverse: int = Field(default=4, ge=0, description="guide images far from those and from each other")
    attempts: int = Field(default=4, ge=1, description="answers asked for before a class is given up")
    retries: int = Field(
        default=6, ge=0, description="retries of a request that the server or the line refused, with back-off"
    )
    timeout: float = Field(default=120.0, gt=0, description="seconds before a request counts as lost")


class Described(NamedTuple):
    """One class done, and the tokens that it took."""

    name: str
    description: ClassDescription
    tokens_in: int
    tokens_out: int


def instruction(name: str, config: DescribeConfig) -> str:
    """What is asked about one class."""
    rule = f" Never use the name '{spoken(name)}'." if config.name_free else ""
    return (
        f"The pictures show the class '{spoken(name)}'. Write {config.sentences} short phrases, at most {config.words} "
        "words each, that say what can be seen of it: parts, shapes, colours, textures, typical surroundings. One visible "
        "thing per phrase, what most pictures share first, and what sets it apart from similar classes. No opinions, no "
        f"facts that cannot be seen.{rule}"
    )


def with_readable(dataset: Dataset, names: Sequence[str], skip: bool) -> Dataset:
    """The data set with the training images of these classes alone, less those that cannot be read, which a notice names;
    unless `skip`, a DataError does."""
    rows = np.unique(np.concatenate([showing(dataset.train, dataset.classes.index(name)) for name in names]))
    images = taken(dataset.train, rows)
    bad = unreadable(images)
    if not bad:
        return replace(dataset, train=images)
    named = named_unreadable(images, bad)
    if not skip:
        raise UnreadableImages(
            f"data '{dataset.name}': {named}; repair or remove them, or leave them out with --on-bad-image skip", bad
        )
    kept = np.delete(rows, list(bad))
    left = taken(dataset.train, kept)
    for name in names:
        if not len(showing(left, dataset.classes.index(name))):
            raise UnreadableImages(f"class '{name}': {named}, among them all of this class", bad)
    return replace(dataset, train=left, notices=(*dataset.notices, f"left out: {named}"))


def guide_images(
    dataset: Dataset, towers: Towers, names: Sequence[str], config: DescribeConfig
) -> dict[str, list[int]]:
    """Row numbers in the training images, per class: representative ones, then diverse ones, by frozen embeddings."""
    chosen = {}
    for name in names:
        rows = showing(dataset.train, dataset.classes.index(name))
        images = taken(dataset.train, rows)
        z, _ = encode(Loader(images, towers.prepare, towers.pixels), lambda pixels, _: towers.image(pixels))
        chosen[name] = [int(rows[i]) for i in representative_and_diverse(z, config.representative, config.diverse)]
    return chosen


def request(dataset: Dataset, name: str, rows: Sequence[int], config: DescribeConfig) -> dict[str, Any]:
    """The arguments of `chat.completions.create` for one class."""
    schema = {
        "type": "object",
        "properties": {"sentences": {"type": "array", "items": {"type": "string"}}},
        "required": ["sentences"],
        "additionalProperties": False,
    }
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(dataset.train[row])}} for row in rows]
    return {
        "model": config.model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": instruction(name, config)}, *pictures]}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "description", "strict": True, "schema": schema},
        },
    }


def problem_with(answer: str, name: str, config: DescribeConfig) -> tuple[list[str], str]:
    """The sentences of an answer, and what is wrong with them; "" if nothing is."""
    try:
        sentences = json.loads(answer)["sentences"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [], "the answer is not the JSON that was asked for"
    if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
        return [], "'sentences' is not a list of texts"
    sentences = [" ".join(text.split()) for text in sentences]
    if len(sentences) != config.sentences or len(set(sentences)) < len(sentences):
        return sentences, f"{counted(len(set(sentences)), 'different phrase')} where {config.sentences} were asked for"
    for text in sentences:
        if not 1 <= len(text.split()) <= config.words:
            return (
                sentences,
                f"'{text}' has {counted(len(text.split()), 'word')}, at most {config.words} were asked for",
            )
        if config.name_free and spoken(name).lower() in text.lower():
            return sentences, f"'{text}' contains the class name"
    return sentences, ""


def described(
    dataset: Dataset,
    guides: dict[str, list[int]],
    names: Sequence[str],
    config: DescribeConfig,
    log: Log,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
) -> Iterator[Described]:
    """Each of the named classes in turn, as soon as it is done. A class that is given up is a warning and is left out.

    Raises ConfigError if the client is not installed, no key is known, or the server refuses key or model.
    """
    try:
        import openai
    except ImportError:
        raise ConfigError(f"describe: the openai client is missing; {extra_remedy('describe')}") from None
    address = base_url or os.environ.get("OPENAI_BASE_URL")
    if api_key is None and address and is_own_machine(address):
        api_key = os.environ.get("OPENAI_API_KEY") or "none"  # a server of one's own wants no key, the client a text
    try:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=config.retries, timeout=config.timeout)
    except openai.OpenAIError:
        raise ConfigError("describe: no key; set OPENAI_API_KEY (any text, if your server wants none)") from None
    with client:
        for name in names:
            try:
                found = _class_described(client, dataset, guides[name], name, config, log)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ConfigError(
                    f"describe: the server refuses: {_line(error)}; check key, address and model"
                ) from None
            except openai.APIConnectionError as error:
                raise CairnError(
                    f"describe: class '{name}': no server answers at {one_line(str(client.base_url))} ({_line(error)}); start it, or "
                    "give --base-url; the same command goes on here"
                ) from None
            except openai.APIError as error:
                raise CairnError(
                    f"describe: class '{name}': {_line(error)}, after {config.retries} retries; the same command goes on here"
                ) from None
            if found is not None:
                yield found


def is_own_machine(address: str) -> bool:
    """Whether a URL leads to this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _class_described(
    client: Any, dataset: Dataset, rows: Sequence[int], name: str, config: DescribeConfig, log: Log
) -> Described | None:
    asked = request(dataset, name, rows, config)
    tokens_in = tokens_out = 0
    problem = ""
    for _ in range(config.attempts):
        answer = client.chat.completions.create(**asked)
        if answer.usage is not None:
            tokens_in += answer.usage.prompt_tokens
            tokens_out += answer.usage.completion_tokens
        message = answer.choices[0].message if answer.choices else None
        if message is None or not message.content:
            problem = f"refused: {message.refusal}" if message is not None and message.refusal else "an empty answer"
            continue
        sentences, problem = problem_with(message.content, name, config)
        if not problem:
            images = tuple(dataset.train.describe(row) for row in rows)
            description = ClassDescription(
                sentences=tuple(sentences),
                model=answer.model or config.model,
                prompt=instruction(name, config),
                images=images,
                date=date.today().isoformat(),
            )
            return Described(name, description, tokens_in, tokens_out)
    log("warning", text=f"class '{name}': given up after {config.attempts} answers, the last: {problem}")
    return None


def _data_url(item: Any) -> str:
    image = item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))
    image = image.convert("RGB")
    image.thumbnail((KEPT_SIZE, KEPT_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
