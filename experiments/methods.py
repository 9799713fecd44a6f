"""The tables of methods in the documents, from the methods' own cards.

python experiments/methods.py
"""

from __future__ import annotations

import re
from pathlib import Path

from cairn.methods.catalogue import METHODS
from cairn.reports.formats import Column, Table
from cairn.reports.tables import replaced_block

ROOT = Path(__file__).resolve().parents[1]


def papers() -> Table:
    """What each method is, where it was published, where its code is."""
    rows = []
    for name, entry in METHODS.items():
        number = re.search(r"arXiv (\d{4}\.\d{5})", entry.card.citation)
        file = entry.build.__module__.replace(".", "/") + ".py"
        rows.append(
            [
                f"`{name}`",
                entry.card.title,
                f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else entry.card.source,
                f"[{Path(file).name}]({file})",
            ]
        )
    return Table([Column("method"), Column("what"), Column("paper"), Column("file")], rows)


def choices() -> Table:
    """What each method needs and costs."""
    titles = ("method", "trains", "keeps", "needs", "passes through the image tower in learning")
    rows = [
        [f"`{name}`", card.trains, card.keeps, card.needs, card.passes]
        for name, card in ((name, entry.card) for name, entry in METHODS.items())
    ]
    return Table([Column(title) for title in titles], rows)


PAGES = {"README.md": papers, "docs/choose-a-method.md": choices}


def main() -> None:
    for page, table in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(replaced_block(text, "methods", table().markdown()), encoding="utf-8")


if __name__ == "__main__":
    main()
