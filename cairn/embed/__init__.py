"""Embeddings of a whole data set in one features file, made in shards by one process or many.

The plan says which images, which towers and how. A shard is so many rows of it, made by whoever is free; it lies beside the
file until all are there. Nobody's death loses more than one shard, and who made which leaves no trace in the file: every
pass through the tower has the same number of images.

    FILE.parts/plan.json                 the plan
    FILE.parts/train-000000.safetensors  a shard: `rows` (n, d); in its metadata the plan's key and the SHA-256 of its bytes
"""

from cairn.embed.plan import EmbedConfig
from cairn.embed.runner import Embedded, Rank, embed_dataset

__all__ = ["EmbedConfig", "Embedded", "Rank", "embed_dataset"]
