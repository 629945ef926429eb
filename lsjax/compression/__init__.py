"""KV head compression: which heads keep all tokens, and how heads are reordered for it."""

from lsjax.compression.razor import (
    Compression,
    RazorConfig,
    choose,
    compression_of,
    estimate_without_scores,
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
    "RazorConfig",
    "choose",
    "compression_of",
    "estimate_without_scores",
    "parse_compression",
    "read_scores",
    "write_bounds",
    "write_scores",
]
