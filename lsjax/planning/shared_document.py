"""A document that all prompts begin with: its caches, and its bytes in memory and on disk."""

import dataclasses

from lsjax.cache import CacheSpec
from lsjax.config import ModelConfig
from lsjax.documents import sharing_borders
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
    tokens, rows = deployment.document_length, deployment.sizes["data"]
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
    return DocumentSpecs(
        document=deployment.cache_spec(rows, max(cached, 1), 0),
        rest=deployment.cache_spec(rows, max(shared - cached, 1), 0),
        own=request.cache_spec(deployment),
        whole=request.whole_cache_spec(deployment),
    )


def held_bytes(config: ModelConfig, platform: str, deployment: Deployment) -> int:
    """Returns the bytes per device of a document that has been read."""
    specs, mesh = document_specs(config, deployment, 1), deployment.mesh
    full, windowed = _by_window(config)
    copied = specs.rest.nbytes(full, mesh, platform)
    copied += specs.document.nbytes(windowed, mesh, platform)
    return shared_bytes(config, platform, deployment) + copied


def shared_bytes(config: ModelConfig, platform: str, deployment: Deployment) -> int:
    """Returns the bytes per device of what all rows share of a document."""
    spec = _without_tail(document_specs(config, deployment, 1).document)
    return spec.nbytes(_by_window(config)[0], deployment.mesh, platform)


def own_bytes(
    config: ModelConfig, platform: str, deployment: Deployment, question_length: int
) -> int:
    """Returns the bytes per device of the rows' own caches."""
    specs, mesh = document_specs(config, deployment, question_length), deployment.mesh
    full, windowed = _by_window(config)
    return specs.own.nbytes(full, mesh, platform) + specs.whole.nbytes(windowed, mesh, platform)


def saved_bytes(config: ModelConfig, deployment: Deployment) -> int:
    """Returns the bytes of keys, values and ids of a saved document."""
    tokens, border = deployment.document_length, sharing_borders(config, deployment)[1]
    cached = tokens // border * border
    layers = tuple(dataclasses.replace(layer, window=None) for layer in config.layers)
    spec = _without_tail(deployment.cache_spec(1, max(cached, 1), 0))
    per_token = spec.nbytes(dataclasses.replace(config, layers=layers)) // spec.capacity
    return cached * per_token + 4 * tokens


def _by_window(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """Returns the model with its layers without a window alone, and with the others alone."""
    full = tuple(layer for layer in config.layers if layer.window is None)
    windowed = tuple(layer for layer in config.layers if layer.window is not None)
    return tuple(dataclasses.replace(config, layers=layers) for layers in (full, windowed))


def _without_tail(spec: CacheSpec) -> CacheSpec:
    return dataclasses.replace(spec, block=0)
