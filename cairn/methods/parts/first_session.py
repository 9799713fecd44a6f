"""The image encoder adapted to the first task and to no other: what class-incremental heads often begin with.

Source: APER (Zhou et al. 2023), section 4.2, and the first-session adaptation of RanPAC (McDonnell et al. 2023),
algorithm 1: the encoder is tuned with a linear classifier that is thrown away. That this classifier is one of cosines,
and starts at the class means of the frozen embeddings, is ours [I].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cairn.data.loading import Loader
from cairn.maths.losses import class_cross_entropy
from cairn.maths.similarity import unit
from cairn.methods.parts.stages import as_tuned, competing
from cairn.towers.protocol import Towers
from cairn.towers.tuning import ImageEncoder
from cairn.training.context import Context
from cairn.training.encode import encode
from cairn.training.fit import Schedule, fit
from cairn.types import Features, Labels


def adapted(
    encoder: ImageEncoder, towers: Towers, loader: Loader, schedule: Schedule, ctx: Context
) -> tuple[Features, Labels]:
    """Tune the encoder: CE(s unit(f(x)) unit(w)^T, y) over f and the classifier w. Frozen embeddings and labels of the images.

    Nothing is tuned if the encoder has nothing to train, or has been trained before.
    """
    z, y = encode(loader, lambda pixels, _: towers.image(pixels), ctx, "Z")
    if encoder.parameters() and not encoder.version and schedule.epochs:
        encoder.version = 1
        classes, which = y.unique(return_inverse=True)
        if len(competing(classes, len(classes), ctx.log)) < 2:
            return z, y
        w = nn.Parameter(torch.stack([unit(z[which == i]).mean(0) for i in range(len(classes))]).to(encoder.device))

        def loss(pixels: Tensor, labels: Tensor) -> Tensor:
            labels = torch.searchsorted(classes, labels).to(w.device)
            return class_cross_entropy(unit(encoder(pixels)), unit(w), labels, towers.logit_scale)

        schedule, average = as_tuned(encoder, schedule)
        trained = [*encoder.parameters(), w]
        fit(loss, trained, loader, schedule, ctx, average=average, model=encoder)
    return z, y
