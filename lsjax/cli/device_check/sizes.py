"""Sizes of the measurements: those of real models on an accelerator, small ones on a CPU."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Heads:
    """A model's attention heads: KV heads, query heads per KV head, channels per head."""

    kv_heads: int
    group: int
    head_dim: int


HEADS = {
    "GLM-4-9B": Heads(4, 8, 128),
    "Qwen2.5-7B": Heads(4, 7, 128),
    "Qwen2.5-0.5B": Heads(2, 7, 64),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements; lengths are in tokens.

    Attributes:
      head_dims: channels per head that kernels are checked with.
      check_keys: keys in a decode check. The largest power of two that divides them is 256, so
        that no kernel's block of keys is longer.
      check_prefill: (queries, keys) of a prefill check.
      check_blocks: blocks of keys in a check of sparse prefill.
      heads: names in HEADS that are timed.
      decode_keys: cache lengths that decode attention is timed over.
      rotated_bytes: bytes of the caches that timed calls cycle through, far more than a GPU's L2
        cache holds.
      prefill: (queries, keys) that prefill attention is timed for.
      array_bytes: bytes of the array that is copied and read for a ceiling.
      product: rows of the square matrices whose product is a ceiling.
      prompt, output, chunk: prompt length, output length and prefill chunk for whole models.
      rounds: timed rounds, whose median counts.
    """

    head_dims: tuple[int, ...] = (64, 80, 96, 128, 256)
    check_keys: int = 2048 + 256
    check_prefill: tuple[int, int] = (1300, 32768 + 5120)
    check_blocks: int = 48
    heads: tuple[str, ...] = tuple(HEADS)
    decode_keys: tuple[int, ...] = (131_072, 1_048_576)
    rotated_bytes: int = 2 * 10**9
    prefill: tuple[tuple[int, int], ...] = ((32768, 32768), (4096, 131_072))
    array_bytes: int = 2**31
    product: int = 8192
    prompt: int = 131_072
    output: int = 64
    chunk: int = 4096
    rounds: int = 10


ON_A_CPU = Sizes(
    head_dims=(80,),
    check_keys=768,
    check_prefill=(40, 700),
    check_blocks=8,
    heads=("Qwen2.5-0.5B",),
    decode_keys=(2048,),
    rotated_bytes=0,
    prefill=((256, 256),),
    array_bytes=2**26,
    product=512,
    prompt=128,
    output=16,
    chunk=64,
    rounds=3,
)


def sizes_on(platform: str) -> Sizes:
    """Returns the sizes for a platform, named as JAX does: cpu, gpu or tpu."""
    return ON_A_CPU if platform == "cpu" else Sizes()
