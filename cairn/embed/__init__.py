"""Embeddings of a whole data set in one features file, made in shards by one process or many.

The plan says which images, which towers and how; it is the same for all who take part. A shard is so many rows of it: it is
made by whoever is free and lies beside the file until all are there. So nobody's death loses more than one shard, and who
made which leaves no trace in the file: every pass through the tower has the same number of images.

    FILE.parts/plan.json         the plan
    FILE.parts/rows.safetensors  which images of the data set, and their classes
    FILE.parts/train-000000...   the shards
"""

from cairn.embed.conduct import Embedded, Rank, embed_dataset
from cairn.embed.plan import EmbedConfig

__all__ = ["EmbedConfig", "Embedded", "Rank", "embed_dataset"]
