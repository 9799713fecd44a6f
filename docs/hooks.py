"""What the site needs beside the pages: files of the repository that pages link to, and its own three documents.

Pages are written to be read in the repository, where `../cairn/...` and `../results/...` lead somewhere. Here each such link
gets a copy of its file in the site. Pictures keep their path; other files lie under `source/`, Python as text, so that a
browser shows it. A link to a folder becomes its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = (".png", ".svg", ".gif", ".jpg", ".webp")
SHOWN = (".json", ".txt")
"""Kinds that a browser shows as they are."""

LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")


def place(path: Path) -> str | None:
    """Where a file of the repository is in the site, from its top; None for a folder."""
    below = PurePosixPath(path.relative_to(ROOT).as_posix())
    if str(below) in DOCUMENTS:
        return DOCUMENTS[str(below)]
    if below.parts[0] == "docs":
        return str(below.relative_to("docs"))
    if path.is_dir():
        return None
    if below.suffix in PICTURES:
        return str(below)
    if below.suffix in SHOWN:
        return f"source/{below}"
    return f"source/{below}.txt"


def linked(page: Path, path: str) -> Path:
    """The file behind a link of a page, which must be there and within the repository."""
    found = (page.parent / path).resolve()
    if not found.exists() or not found.is_relative_to(ROOT):
        raise PluginError(f"{page.name}: the link '{path}' leads nowhere")
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri in DOCUMENTS.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in [file for file in files if file.is_documentation_page()]:
        source = Path(page.abs_src_path)
        for match in LINK.finditer(source.read_text(encoding="utf-8")):
            found = linked(source, match["path"])
            uri = place(found)
            if uri and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(found)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path)

    def moved(match: re.Match) -> str:
        uri = place(linked(source, match["path"]))
        return match["text"].strip("[]") if uri is None else f"{match['text']}({uri}{match['anchor'] or ''})"

    # A table begins after an empty line
    markdown = re.sub(r"^(<!-- .* -->)$", r"\n\1\n", LINK.sub(moved, markdown), flags=re.MULTILINE)
    return "\n".join(deeper(markdown.splitlines()))


def deeper(lines: list[str]) -> Iterator[str]:
    """What is indented below an item of a list by two stands at four, where Python-Markdown looks for it."""
    fenced = False
    for line in lines:
        fenced ^= line.startswith("```")
        yield f"  {line}" if line.startswith("  ") and not fenced else line
