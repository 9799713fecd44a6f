"""Methods over the streams that several of them were run on: tables and figures of the documents, from stored results.

python experiments/ranking.py
"""

from __future__ import annotations

from pathlib import Path

from stored import write_block

from cairn.reports.ranking import best_table, critical_difference_chart, few_images_charts, ranking_table, standings

ROOT = Path(__file__).resolve().parents[1]

STREAMS = ("shapes", "cifar100", "ucf101", "imagenet150", "caltech51", *(f"caltech51-{n}" for n in (8, 4, 2, 1)))
"""As the documents list them; UCF-101 has no class texts, so zero-shot is not among those that are ranked over all of them."""

HALF_FIRST = "cifar100-b50"
"""Shown among the best, but not ranked over: fewer methods were run on it."""

BLOCKS = {"README.md": "best", "docs/choose-a-method.md": "ranking"}


def blocks() -> dict[str, str]:
    """What stands in each page's block."""
    found = standings([ROOT / "results" / stream for stream in STREAMS])
    shown = standings([ROOT / "results" / stream for stream in (*STREAMS[:2], HALF_FIRST, *STREAMS[2:])])
    return {"README.md": best_table(shown).markdown(), "docs/choose-a-method.md": ranking_table(found).markdown()}


def main() -> None:
    for page, text in blocks().items():
        write_block(ROOT / page, BLOCKS[page], text)
    found = standings([ROOT / "results" / stream for stream in STREAMS])
    for chart in (critical_difference_chart(found), *few_images_charts(found)):
        if chart is not None:
            for path in chart.write(ROOT / "docs" / "pictures"):
                if path.suffix == ".svg":
                    path.unlink()


if __name__ == "__main__":
    main()
