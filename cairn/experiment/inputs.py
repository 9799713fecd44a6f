"""What a run needs, opened and checked before anything is learned: method, data, towers and settings."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from cairn.classifier.self_training import why_not
from cairn.config import settings as every_setting
from cairn.config import with_settings
from cairn.data.few_labels import shared_rows
from cairn.data.folders import loose_pictures, named_unreadable, unreadable
from cairn.data.images import Concatenation, Dataset, Images, Unlabelled
from cairn.data.online import CHUNK
from cairn.data.opening import open_dataset
from cairn.data.same_files import repeats
from cairn.data.stream import TaskStream, reduced_stream, task_stream, without
from cairn.data.templates import prompt_templates
from cairn.errors import ConfigError, DataError, counted, one_line
from cairn.experiment.schema import RunConfig
from cairn.methods.catalogue import METHODS, Entry, method_named
from cairn.methods.protocol import LearnsOnline, Method
from cairn.settings import Settings
from cairn.storage.versions import versions
from cairn.towers.catalogue import load_towers
from cairn.towers.clip import ClipTowers
from cairn.towers.feature_file import features_towers, require_no_images_asked
from cairn.towers.features import FeatureTowers
from cairn.towers.preprocessing import decoded_side
from cairn.towers.protocol import Towers
from cairn.training.context import Processes


def towers_for(config: RunConfig, dataset: Dataset) -> ClipTowers | FeatureTowers:
    """The towers a run asks for; a features file is its own towers. Raises ConfigError if the two do not fit."""
    held = dataset.embeddings
    if held is None:
        spec = "tiny" if config.towers == "auto" else config.towers
        return load_towers(
            spec,
            device=config.device,
            precision=config.precision,
            preprocess=config.preprocess,
            decode=config.decode,
            revision=config.revision,
        )
    if config.towers not in ("auto", "features"):
        raise ConfigError(
            f"towers '{config.towers}': data '{config.data}' holds embeddings, not images; leave --towers out"
        )
    require_no_images_asked(config.data, config.precision, config.decode, config.preprocess, config.revision)
    return features_towers(dataset, config.data)


def stream_for(config: RunConfig, dataset: Dataset) -> TaskStream:
    loose, notices = _loose(config, dataset)
    stream = _cut(config, dataset, loose)
    if loose is None or config.unlabelled is None:
        return stream
    tests = (dataset.test, *stream.tests) if config.validation else (dataset.test,)
    shown, tested = f"unlabelled '{one_line(config.unlabelled)}'", shared_rows(loose, tests)
    if len(tested) == len(loose):
        raise DataError(f"{shown}: all of its pictures are test images of data '{dataset.name}'; give others")
    if len(tested):
        stream = _cut(config, dataset, Unlabelled(loose, np.delete(np.arange(len(loose)), tested)))
        notices = (*notices, f"{shown}: left out, as test images: {len(tested)} of {counted(len(loose), 'picture')}")
    return replace(stream, notices=(*stream.notices, *notices))


def _cut(config: RunConfig, dataset: Dataset, loose: Images | None) -> TaskStream:
    return task_stream(
        dataset,
        base=config.base,
        step=config.step,
        order=config.order,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        validation=config.validation,
        imbalance=config.imbalance,
        blurry=config.blurry,
        chunk=_chunk(config),
        labelled=config.labelled,
        unlabelled=loose,
    )


def _loose(config: RunConfig, dataset: Dataset) -> tuple[Images | None, tuple[str, ...]]:
    """Pictures without labels, if a folder of them is given, and what a user should hear of it."""
    if config.unlabelled is None:
        return None, ()
    if dataset.embeddings is not None:
        raise ConfigError(
            f"unlabelled '{config.unlabelled}': data '{dataset.name}' holds embeddings, not images; leave --unlabelled out"
        )
    return loose_pictures(config.unlabelled)


def _chunk(config: RunConfig) -> int | None:
    """Images that are learned at once, None for whole tasks."""
    if config.stream == "online":
        return CHUNK if config.chunk is None else config.chunk
    if config.chunk is not None:
        raise ConfigError(
            f"chunk {config.chunk}: tasks are learned whole; ask for --stream online, or leave --chunk out"
        )
    return None


class Prepared(NamedTuple):
    """What a run needs, found good before anything is learned."""

    entry: Entry
    stream: TaskStream
    towers: Towers
    settings: Settings


def prepared(config: RunConfig) -> Prepared:
    """Raises a CairnError for any bad input."""
    entry = method_named(config.method)
    dataset = prompted(open_dataset(config.data), config.template)
    stream = stream_for(config, dataset)
    towers = towers_for(config, dataset)
    stream = replace(stream, notices=(*stream.notices, *towers.notices))
    settings = with_settings(entry.default_config(towers), config.settings)
    stream = readable(stream, skip=config.on_bad_image == "skip")
    if config.pseudo_labels is not None:
        _require_self_training(entry, stream, config.pseudo_labels)
    stream = replace(stream, notices=(*stream.notices, *repeats(stream)))
    return Prepared(entry, reduced_stream(stream, decoded_side(towers)), towers, settings)


def tower_stands(entry: Entry, settings: Settings) -> bool:
    """Whether the method takes embeddings of the image tower as it is, of the images as they are, and keeps no image."""
    tunings = {value for path, value, _ in every_setting(settings) if path.rpartition(".")[2] == "tuning"}
    return tunings <= {"none", "adapter"} and not settings.alters_images and entry.card.keeps != "images"


def prompted(dataset: Dataset, template: str | None) -> Dataset:
    """The data set with one template in place of its own, if one is given."""
    if template is None:
        return dataset
    templates = prompt_templates(template, "template")
    if dataset.embeddings is not None:
        raise ConfigError(
            f"template '{template}': data '{dataset.name}' holds embeddings of texts; leave --template out"
        )
    return replace(dataset, templates=templates)


def readable(stream: TaskStream, skip: bool) -> TaskStream:
    """The stream without the image files that cannot be read, which a notice names; unless `skip`, a DataError does."""
    whole = Concatenation(stream.collections)
    bad = unreadable(whole)
    if not bad:
        return stream
    named = named_unreadable(whole, bad)
    if not skip:
        raise DataError(
            f"data '{stream.name}': {named}; repair or remove them, or leave them out with --on-bad-image skip"
        )
    starts = np.cumsum([0, *map(len, stream.collections)])
    found = [[row - start for row in bad if start <= row < stop] for start, stop in pairwise(starts)]
    return replace(without(stream, found), notices=(*stream.notices, f"left out: {named}"))


WHOLE_BATCHES = ("text_anchor_contrast",)
"""Settings that weigh a loss in which the images of a batch depend on one another."""


def require_shareable(settings: BaseModel, world: Processes) -> None:
    """Raises ConfigError for a loss of which no process can compute its share."""
    for path, value, _ in every_setting(settings):
        if path.rpartition(".")[2] in WHOLE_BATCHES and value:
            raise ConfigError(
                f"{path} {value}: looks at whole batches, of which each of {world.world_size} processes has a part; set it to 0, or "
                "run one process"
            )


def require_online(entry: Entry, method: Method) -> None:
    """Raises ConfigError for a method that, with its settings, goes over the images of a task more than once."""
    reason = method.repeats if isinstance(method, LearnsOnline) else "it goes over the images of a task again and again"
    if reason is not None:
        able = ", ".join(name for name, other in METHODS.items() if LearnsOnline in other.capabilities)
        raise ConfigError(f"--stream online: not with method '{entry.name}': {reason}; take one of {able}")


def _require_self_training(entry: Entry, stream: TaskStream, share: float) -> None:
    """Raises ConfigError for a method that is not taught so, and where no image is without a label."""
    if reason := why_not(entry.build):
        raise ConfigError(f"--pseudo-labels {share:g}: not with method '{entry.name}': {reason}; leave it out")
    if not any(map(len, stream.unlabelled)):
        raise ConfigError(f"--pseudo-labels {share:g}: all images have labels; give --labelled or --unlabelled")


def require_alike(stream: TaskStream, towers: Towers, world: Processes) -> None:
    """Raises ConfigError if the processes do not start from the same. All of them come to this, or none goes on."""
    here = {"data": stream.fingerprint, "towers": towers.fingerprint, "precision": towers.precision} | versions()
    for rank, there in enumerate(everyone := world.all_gather(here)):
        for key, value in there.items():
            if value != everyone[0][key]:
                raise ConfigError(
                    f"{key}: process {rank} has {value}, the first {everyone[0][key]}; give all of them the same"
                )
