"""What is learned chunk after chunk is what is learned at once, where sums are all there is."""

from __future__ import annotations

import pytest
import torch
from teaching import rows, taught

from cairn.config import with_values
from cairn.data.stream import task_stream
from cairn.methods.catalogue import METHODS

EXACT = {
    "acil": {"width": 40},
    "blend": {"features": 24, "rank": None, "precision": "float64"},
    "lda": {},
    "ranpac": {"width": 40, "lowest": 0, "highest": 0},
    "simplecil": {},
    "zero-shot": {},
}
"""With settings in which nothing is cut off, and no ridge is chosen."""


@pytest.mark.parametrize("blurry", [0.0, 0.4])
@pytest.mark.parametrize("chunk", [1, 17])
@pytest.mark.parametrize("name", EXACT)
def test_chunks_add_up_to_the_whole(name, chunk, blurry, flat, embedded_dataset):
    entry = METHODS[name]

    def built():
        return entry.build(flat, with_values(entry.default_config(flat), EXACT[name].items()), seed=1)

    online = task_stream(embedded_dataset, step=2, chunk=chunk, blurry=blurry)
    whole = task_stream(embedded_dataset, step=2, blurry=blurry)
    pieces = taught(built(), [part.content for part in online.parts()])
    at_once = taught(built(), whole.tasks)
    z = torch.cat([rows(test) for test in whole.tests])
    if name != "blend":
        torch.testing.assert_close(pieces.scores(z), at_once.scores(z), rtol=1e-4, atol=2e-3)
        return
    # Its weights follow from what a chunk shows; the sums behind them are the same
    assert torch.equal(pieces.memory.counts, at_once.memory.counts)
    torch.testing.assert_close(pieces.memory.means, at_once.memory.means)
    for c in range(6):
        torch.testing.assert_close(
            *(m.memory.statistics.factors[c].T @ m.memory.statistics.factors[c] for m in (pieces, at_once))
        )
    torch.testing.assert_close(pieces.gram.state_dict(), at_once.gram.state_dict(), rtol=1e-5, atol=1e-6)
