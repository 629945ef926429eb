"""What a model is, parsed once from config.json and then never a dict again."""

import dataclasses
import math

# Positions for which rotation angles are exact; more are refused.
MAX_POSITIONS = 2**22

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed to serve more positions than were trained.

    Fields that a kind does not use keep their defaults; `lsjax.positions.scaling` says which
    kind needs which.
    """

    kind: str = "default"
    factor: float = 1.0
    original_length: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, whichever family's config.json described it.

    Attributes:
      architecture: the name in config.json's `architectures`.
      vocab_size: rows of the embedding and of the output head.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP.
      num_layers: decoder blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; each serves num_heads / num_kv_heads query heads.
      head_dim: width of one head.
      max_position_embeddings: config.json's own figure for the longest sequence, in tokens.
      norm_eps: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rotary_dim: how many of head_dim's channels are rotated, from the first.
      rope_interleaved: rotate adjacent pairs (2i, 2i+1) instead of halves (i, i + rotary_dim/2).
      rope_scaling: see RopeScaling.
      auto_rope_kind: what rope_scaling "auto" applies to lengths past the trained one.
      alibi: scores fall with distance (arXiv 2108.12409), and nothing is rotated.
      qkv_bias, out_bias, mlp_bias: which projections add a bias.
      qk_norm: RMSNorm of queries and keys over head_dim before rotation.
      post_norms: RMSNorm of attention's and the MLP's output before each residual add.
      tie_embeddings: the output head is the embedding.
      normalised_head: the output head's rows are scaled to length 1.
      windows: for each layer the sliding window in tokens (a query sees itself and the
        window - 1 tokens before it), or None for the whole past.
      eos_token_ids: any of these ends an answer.
      dtype: the dtype that the checkpoint was published in.
      exact_length: tokens up to which attention is as the model wants it; None for any number.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_interleaved: bool
    rope_scaling: RopeScaling
    auto_rope_kind: str
    alibi: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    tie_embeddings: bool
    normalised_head: bool
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    dtype: str
    exact_length: int | None = None

    @property
    def trained_length(self) -> int:
        """Tokens the weights were trained for, before any scaling.

        yarn and longrope files may have max_position_embeddings raised to the length served.
        llama3 checkpoints were trained at max_position_embeddings with the scaling on.
        """
        scaling = self.rope_scaling
        if scaling.kind in ("yarn", "longrope") and scaling.original_length is not None:
            return scaling.original_length
        return self.max_position_embeddings

    @property
    def served_length(self) -> int:
        """Tokens that the scaling in force is meant to serve."""
        scaling = self.rope_scaling
        if scaling.kind == "auto":
            return MAX_POSITIONS
        if scaling.kind in ("linear", "dynamic", "ntk", "yarn"):
            return math.floor(self.trained_length * scaling.factor)
        return self.max_position_embeddings

    @property
    def traced(self) -> "ModelConfig":
        """The model as compiled programs see it: without what only the host reads.

        Models that differ in rope_scaling alone share programs, which take its tables as arguments.
        """
        return dataclasses.replace(
            self,
            architecture="",
            max_position_embeddings=0,
            rope_theta=1.0,
            rope_scaling=RopeScaling(),
            auto_rope_kind="",
            eos_token_ids=(),
            dtype="",
            exact_length=None,
        )
