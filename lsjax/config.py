"""The configuration of a model, parsed once from config.json into dataclasses."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

# Number of positions for which rotation angles are exact; longer sequences are refused.
MAX_POSITIONS = 2**22

DTYPES = ("float32", "bfloat16", "float16")

# Vectors of a gated MLP's width that a prefill program holds for a token: those of gate and up.
HELD_MLP_VECTORS = 2


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotation is changed to serve more positions than the model was trained for.

    Fields that a kind does not use keep their defaults. `lsjax.positions.scaling` lists the fields
    of each kind.
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
    chunk_size: int | None = None
    local_size: int | None = None


class StateArray(NamedTuple):
    """An array that a recurrence keeps of a row.

    Attributes:
      shape: its shape.
      heads: the axis of `shape` that devices share.
      dtype: its dtype; None for that of the activations.
    """

    shape: tuple[int, ...]
    heads: int
    dtype: str | None = None


class HalfLayer(Protocol):
    """A half of a layer: what brings tokens together, or what runs on each token by itself.

    The file of a family describes its own in a frozen dataclass. What runs it is a module, see
    lsjax.nn.layer_modules.
    """

    @property
    def split(self) -> Mapping[str, int]:
        """Name and number of what devices share; the number of these devices must divide it.

        They are those of the axes context and model for a recurrence, and of model for an MLP.
        """

    @property
    def float_weights(self) -> tuple[str, ...]:
        """Paths below the module of the matrices that stay in floats beside int8 weights."""

    @property
    def matrix_rows(self) -> int:
        """The number of vectors of the hidden size that a token is multiplied by."""


class Recurrence(HalfLayer, Protocol):
    """A recurrence over tokens in the place of attention, with a state of constant size."""

    @property
    def name(self) -> str:
        """The module's name in the parameter tree: parameters are at layers_N/NAME/...

        Norms among them multiply by their weight, whatever those of the model do.
        """

    @property
    def state(self) -> Mapping[str, StateArray]:
        """The arrays of its state, by name."""

    @property
    def operations(self) -> float:
        """The floating-point operations of a token, without those products."""

    @property
    def held_bytes(self) -> float:
        """Bytes that a prefill program holds for a token, over all devices of a model axis."""


class MLP(HalfLayer, Protocol):
    """The half that runs on each token by itself; its parameters are at layers_N/mlp."""

    @property
    def multiplies_at_once(self) -> bool:
        """Whether prefill multiplies by all of its weights at once, so that they are gathered."""

    def held_channels(self, hidden_size: int, model: int) -> float:
        """Returns the numbers that prefill holds for a token on each of `model` devices."""

    def share_read(self, name: str, tokens: int) -> float:
        """Returns the share of a parameter that a step of some tokens reads, by path below it."""


@dataclasses.dataclass(frozen=True)
class DenseMLP:
    """A gated MLP: the MLP of layers whose kind names no other.

    Attributes:
      width: width of gate and up.
      bias: whether the projections add a bias.
    """

    width: int
    bias: bool

    float_weights = ()
    multiplies_at_once = False

    @property
    def split(self) -> Mapping[str, int]:
        return {"MLP channels": self.width}

    @property
    def matrix_rows(self) -> int:
        return 3 * self.width

    def held_channels(self, hidden_size: int, model: int) -> float:
        return HELD_MLP_VECTORS * self.width / model

    def share_read(self, name: str, tokens: int) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The kind of a decoder block; blocks of one kind have parameters of the same shapes.

    Attributes:
      window: sliding window in tokens (a query sees itself and the window - 1 tokens before it), or
        None for full attention.
      mlp: what is in the place of the gated MLP, or None.
      recurrence: recurrence in the place of attention, or None.
    """

    window: int | None = None
    mlp: MLP | None = None
    recurrence: Recurrence | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether the layer keeps all tokens, and later ones leave what it keeps as it is."""
        return self.window is None and self.recurrence is None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Configuration of a decoder-only transformer of any supported family.

    Attributes:
      architecture: name in config.json's `architectures`.
      vocab_size: rows of the embedding and of the output head.
      hidden_size: width of the residual stream.
      intermediate_size: width of the gated MLP; see LayerKind for layers with another MLP.
      layers: kind of each decoder block.
      num_heads: number of query heads.
      num_kv_heads: number of KV heads; each serves num_heads / num_kv_heads query heads.
      head_dim: width of one head.
      max_position_embeddings: longest sequence in tokens, as config.json states it.
      norm_eps: epsilon of every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rotary_dim: number of channels of a head that are rotated, from the first on.
      rope_interleaved: whether channels are rotated in adjacent pairs (2i, 2i+1) instead of halves
        (i, i + rotary_dim/2).
      rope_scaling: scaling of the rotary frequencies.
      alibi: whether positions are encoded by ALiBi (arXiv 2108.12409) instead of rotation.
      qkv_bias, out_bias, mlp_bias: whether these projections add a bias.
      qk_norm: whether RMSNorm over head_dim is applied to queries and keys before rotation.
      post_norms: whether RMSNorm is applied to the outputs of attention and MLP before each
        residual add.
      tie_embeddings: whether the output head is the embedding.
      normalized_head: whether the rows of the output head are scaled to norm 1.
      eos_token_ids: token ids that end an answer.
      dtype: dtype in which the checkpoint was published.
      gated_attention: whether q projects to a query and a gate per head; the output of attention is
        multiplied by the gate's sigmoid.
      zero_centered_norms: whether RMSNorm multiplies by 1 + weight.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerKind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_interleaved: bool
    rope_scaling: RopeScaling
    alibi: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    tie_embeddings: bool
    normalized_head: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    gated_attention: bool = False
    zero_centered_norms: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers of attention, without the recurrent ones."""
        return tuple(i for i, layer in enumerate(self.layers) if not layer.recurrence)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, or None."""
        return tuple(layer.window for layer in self.layers)

    @property
    def attention_windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer of attention, or None."""
        return tuple(self.windows[i] for i in self.attention_layers)

    def mlp_of(self, kind: LayerKind) -> MLP:
        """Returns the MLP of a kind of layer."""
        return kind.mlp or DenseMLP(self.intermediate_size, self.mlp_bias)

    @property
    def mlps(self) -> tuple[MLP, ...]:
        """The distinct MLPs of the layers."""
        return tuple(dict.fromkeys(map(self.mlp_of, self.layers)))

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        """The distinct recurrences among the layers."""
        return tuple(dict.fromkeys(kind.recurrence for kind in self.layers if kind.recurrence))

    @property
    def trained_length(self) -> int:
        """The length in tokens that the weights were trained for, before any scaling.

        yarn and longrope files may have max_position_embeddings raised to the served length.
        llama3 checkpoints were trained at max_position_embeddings with the scaling on. With
        dual_chunk max_position_embeddings is the length that is served.
        """
        scaling = self.rope_scaling
        if scaling.kind == "dual_chunk":
            return scaling.original_length or scaling.chunk_size
        if scaling.kind in ("yarn", "longrope") and scaling.original_length is not None:
            return scaling.original_length
        return self.max_position_embeddings

    @property
    def served_length(self) -> int:
        """The length in tokens that the effective scaling is meant to serve."""
        scaling = self.rope_scaling
        if scaling.kind == "auto":
            return MAX_POSITIONS
        if scaling.kind in ("linear", "dynamic", "ntk", "yarn"):
            return math.floor(self.trained_length * scaling.factor)
        return max(self.max_position_embeddings, self.trained_length)

    @property
    def traced(self) -> "ModelConfig":
        """The configuration as compiled programs see it, without fields that only the host reads.

        Models that differ only in rope_scaling share programs, which take the rotary tables as
        arguments.
        """
        return dataclasses.replace(
            self,
            architecture="",
            max_position_embeddings=0,
            rope_theta=1.0,
            rope_scaling=RopeScaling(),
            eos_token_ids=(),
            dtype="",
        )
