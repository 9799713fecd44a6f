"""Methods over the streams that several of them were run on: tables and figures of the documents, from stored results.

python experiments/ranking.py
"""

from __future__ import annotations

from pathlib import Path

from stored import write_block

from cairn.reports.ranking import (
    Standings,
    best_table,
    critical_difference_chart,
    few_images_charts,
    ranking_table,
    standings,
)

ROOT = Path(__file__).resolve().parents[1]

STREAMS = (
    *("shapes", "cifar100", "cifar100-b50", "ucf101", "imagenet150", "caltech51"),
    *(f"caltech51-{n}" for n in (8, 4, 2, 1)),
)
"""As the documents list them; UCF-101 has no class texts, so zero-shot is not among those that are ranked over all of them."""

BLOCKS = {"README.md": "best", "docs/choose-a-method.md": "ranking"}


def stored() -> Standings:
    """Runs in the usual class order, and in others."""
    places = [ROOT / "results" / part / stream for stream in STREAMS for part in ("", "orders")]
    return standings([place for place in places if place.is_dir()])


def blocks() -> dict[str, str]:
    """What stands in each page's block."""
    found = stored()
    return {"README.md": best_table(found).markdown(), "docs/choose-a-method.md": ranking_table(found).markdown()}


def main() -> None:
    for page, text in blocks().items():
        write_block(ROOT / page, BLOCKS[page], text)
    found = stored()
    for chart in (critical_difference_chart(found), *few_images_charts(found)):
        if chart is not None:
            for path in chart.write(ROOT / "docs" / "pictures"):
                if path.suffix == ".svg":
                    path.unlink()


if __name__ == "__main__":
    main()
