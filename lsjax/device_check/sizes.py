"""How large each measurement is: as models are on an accelerator, small on a CPU."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Heads:
    """The attention of a model: KV heads, query heads for each of them, channels of a head."""

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
    """Lengths are in tokens.

    Attributes:
      head_dims: channels that kernels are checked with.
      check_keys: keys of a check of decode; 256 is the largest power of two that divides them, as
        no kernel's block of keys is then longer.
      check_prefill: queries and keys of a check of prefill.
      heads: names of HEADS that are timed.
      decode_keys: lengths that decode attention is timed over.
      rotated_bytes: of the caches that timed calls take in turn, far past a GPU's L2 cache.
      prefill: (queries, keys) that prefill attention is timed for.
      array_bytes: that are copied for a ceiling.
      product: rows of the square matrices whose product is a ceiling.
      prompt, output, chunk: of whole models.
      rounds: timed calls, of which the median counts.
    """

    head_dims: tuple[int, ...] = (64, 80, 96, 128, 256)
    check_keys: int = 2048 + 256
    check_prefill: tuple[int, int] = (1300, 32768 + 5120)
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
    """The sizes for a platform, as JAX calls it."""
    return ON_A_CPU if platform == "cpu" else Sizes()
