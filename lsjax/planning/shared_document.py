"""A document that all prompts begin with: its caches, and its bytes in memory and on disk."""

import dataclasses

import jax

from lsjax.cache import CacheSpec, empty_cache, layer_bytes, shared_layers
from lsjax.config import ModelConfig
from lsjax.documents import PARTS, document_spec, sharing_borders
from lsjax.inference.request import Request, bucket
from lsjax.inference.sampling import Sampling
from lsjax.planning.deployment import Deployment


@dataclasses.dataclass(frozen=True)
class DocumentPlan:
    """What a document takes that questions share.

    Attributes:
      tokens: its length.
      saved_bytes: size of its folder.
      questions: number of questions of the planned length that fit side by side, answers included.
    """

    tokens: int
    saved_bytes: int
    questions: int

    def load_seconds(self, bytes_per_second: float) -> float:
        """Returns the seconds that a disk of this rate takes to read the folder."""
        return self.saved_bytes / bytes_per_second


@dataclasses.dataclass(frozen=True)
class DocumentSpecs:
    """Specs of the caches of a document, and of the rows that ask about it.

    Attributes:
      document: cache of the document while it is read, with one row per device of the data axis.
      rest: cache of its tokens that rows copy, with as many rows.
      own: cache of the rows' own tokens.
      whole: cache of all tokens of the rows, for layers with a sliding window.
    """

    document: CacheSpec
    rest: CacheSpec
    own: CacheSpec
    whole: CacheSpec


def document_specs(
    config: ModelConfig, deployment: Deployment, question_length: int
) -> DocumentSpecs:
    """Returns the specs of the caches that questions of this many tokens take."""
    tokens = deployment.document_length
    shared, cached = (tokens // n * n for n in sharing_borders(config, deployment))
    request = Request(
        prompts=((0,),) * deployment.batch,
        num_real=deployment.batch,
        max_output_length=deployment.output_length,
        prompt_capacity=shared + bucket(tokens - shared + question_length),
        sampling=Sampling(),
        eos_token_ids=frozenset(),
        shared=shared,
        cached=cached,
    )
    copied = document_spec(deployment, shared - cached)
    own, whole = request.cache_spec(deployment), request.whole_cache_spec(deployment)
    copied, own, whole = (dataclasses.replace(x, policy=None) for x in (copied, own, whole))
    return DocumentSpecs(document_spec(deployment, cached), copied, own, whole)


def held_bytes(config: ModelConfig, platform: str, deployment: Deployment) -> int:
    """Returns the bytes per device of a document that has been read."""
    specs, mesh = document_specs(config, deployment, 1), deployment.mesh
    full, others = _by_sharing(config)
    copied = specs.rest.nbytes(full, mesh, platform)
    copied += specs.document.nbytes(others, mesh, platform)
    copied += specs.document.nbytes(_recurrent(config), mesh, platform)  # DocumentCache.states
    return shared_bytes(config, platform, deployment) + copied


def shared_bytes(config: ModelConfig, platform: str, deployment: Deployment) -> int:
    """Returns the bytes per device of what all rows share of a document."""
    spec, (full, _) = document_specs(config, deployment, 1).document, _by_sharing(config)
    if deployment.compression is None:
        return _without_tail(spec).nbytes(full, deployment.mesh, platform)
    cache = jax.eval_shape(lambda: empty_cache(config, spec, platform))
    layers = filter(None, shared_layers(cache, config.layers))
    return sum(layer_bytes(layer, deployment.mesh) for layer in layers)


def own_bytes(
    config: ModelConfig, platform: str, deployment: Deployment, question_length: int
) -> int:
    """Returns the bytes per device of the rows' own caches."""
    specs, mesh = document_specs(config, deployment, question_length), deployment.mesh
    full, others = _by_sharing(config)
    return specs.own.nbytes(full, mesh, platform) + specs.whole.nbytes(others, mesh, platform)


def saved_bytes(config: ModelConfig, deployment: Deployment) -> int:
    """Returns the bytes of keys, values, ids and snapshots, at most, of a saved document."""
    tokens, border = deployment.document_length, sharing_borders(config, deployment)[1]
    cached = tokens // border * border
    attention = tuple(layer for layer in config.layers if not layer.recurrence)
    layers = tuple(dataclasses.replace(layer, window=None) for layer in attention)
    document = document_spec(deployment, cached)
    spec = dataclasses.replace(_without_tail(document), policy=None)
    per_token = spec.nbytes(dataclasses.replace(config, layers=layers)) // spec.capacity
    per_token //= document.batch
    states = document.nbytes(_recurrent(config)) // document.batch
    if deployment.compression is None:
        return cached * per_token + 4 * tokens + (cached > 0) * (PARTS + 1) * states
    kept, means, shards = 0, 0, deployment.sizes["model"]
    for i in range(config.num_layers):  # a recurrent one has no heads
        split = deployment.compression.split(i, document.prompt_capacity)
        kept += shards * split.whole * cached
        for heads, window in split.windows:
            kept += shards * heads * min(window.slots, cached)
            means += shards * heads * window.has_compensation
    per_head = per_token // (len(attention) * config.num_kv_heads)
    return kept * per_head + means * 2 * config.head_dim * 4 + 4 * tokens + (cached > 0) * states


def _by_sharing(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """Returns the model with the layers that rows share alone, and with those that they copy."""
    full = tuple(layer for layer in config.layers if layer.keeps_all)
    others = tuple(layer for layer in config.layers if not layer.keeps_all)
    return tuple(dataclasses.replace(config, layers=layers) for layers in (full, others))


def _recurrent(config: ModelConfig) -> ModelConfig:
    """Returns the model with its recurrent layers alone."""
    layers = tuple(layer for layer in config.layers if layer.recurrence)
    return dataclasses.replace(config, layers=layers)


def _without_tail(spec: CacheSpec) -> CacheSpec:
    return dataclasses.replace(spec, block=0)
