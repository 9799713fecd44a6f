"""Embeddings of a whole data set in one features file, made in shards by one process or many.

The plan says which images, which towers and how. A shard is so many rows of it and lies beside the file until all are there.
A process that is killed loses one shard at most. Which process made which shard changes no bit of the file: every pass through
the tower has the same number of images.

    FILE.parts/plan.json                 the plan
    FILE.parts/train-000000.safetensors  a shard: `rows` (n, d); in its metadata the plan's key and the SHA-256 of its bytes
"""

from cairn.embed.plan import EmbedConfig
from cairn.embed.runner import Embedded, embed_dataset

__all__ = ["EmbedConfig", "Embedded", "embed_dataset"]
