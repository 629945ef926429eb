"""KV head compression: which heads keep everything, and how the model is arranged for it."""

from lsjax.compression.razor import (
    Compression,
    Razor,
    assumed,
    choose,
    compression_of,
    parse_compression,
)
from lsjax.compression.scores import (
    HEAD_FILE,
    HeadScores,
    read_scores,
    write_bounds,
    write_scores,
)

__all__ = [
    "HEAD_FILE",
    "Compression",
    "HeadScores",
    "Razor",
    "assumed",
    "choose",
    "compression_of",
    "parse_compression",
    "read_scores",
    "write_bounds",
    "write_scores",
]
