"""Where the sentences about a task's classes come from."""

from __future__ import annotations

from cairn.data.descriptions import read_descriptions, written_by
from cairn.data.task import Task
from cairn.data.templates import filled
from cairn.errors import DataError
from cairn.training.context import Log


def sentences_of(choice: str, task: Task, log: Log) -> tuple[tuple[str, ...], ...]:
    """The sentences of the task's new classes: with `choice` data those of the data set, with template the data set's
    templates filled in, else those of the file it names. Raises DataError for a class without any."""
    if choice == "template":
        log("notice", text="descriptions=template: class names in templates stand in for visual descriptions")
        filled_in = {name: [filled(template, name) for template in task.templates] for name in task.names}
        return written_by("templates", filled_in).of(task.names)
    if choice != "data":
        return read_descriptions(choice).of(task.names)
    if task.descriptions is None:
        raise DataError(
            "descriptions: the data set brings none; run `cairn describe` and set descriptions=FILE, or set "
            "descriptions=template"
        )
    return task.descriptions.of(task.names)
