"""KV compression: policies that keep less of the cache than queries could see."""

from lsjax.compression.parse import parse_compression
from lsjax.compression.policy import Compression, CompressionSettings, served_length
from lsjax.compression.razor import RazorAttention, RazorConfig, choose
from lsjax.compression.scores import (
    HEAD_FILE,
    HeadScores,
    read_scores,
    write_bounds,
    write_scores,
)
from lsjax.compression.streaming_llm import StreamingLLM

__all__ = [
    "HEAD_FILE",
    "Compression",
    "CompressionSettings",
    "HeadScores",
    "RazorAttention",
    "RazorConfig",
    "StreamingLLM",
    "choose",
    "parse_compression",
    "read_scores",
    "served_length",
    "write_bounds",
    "write_scores",
]
