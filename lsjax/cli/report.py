"""Reports a run's configuration and results, as text and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lsjax.compression import served_length
from lsjax.inference import sparsity
from lsjax.inference.completion import Completion, Stats
from lsjax.inference.options import Options
from lsjax.inference.request import Request
from lsjax.inference.sampling import Sampling
from lsjax.positions.dual_chunk import score_factor
from lsjax.positions.frequencies import resolve, rotary_frequencies
from lsjax.runtime.memory import human_bytes


def effective_config(options: Options, requests: Sequence[Request]) -> dict[str, Any]:
    """Returns the configuration that serves the requests, which share their shapes."""
    config = options.config
    request_length = max(max(r.lengths) for r in requests)
    scaling, theta = resolve(config, request_length)
    compression = options.compression
    _, attention_factor = rotary_frequencies(config, request_length)
    attention_factor *= math.sqrt(score_factor(config, request_length))
    return {
        "model": options.folder,
        "architecture": config.architecture,
        "rope_kind": "none, ALiBi" if config.alibi else scaling.kind,
        "rope_theta": theta,
        "rope_factor": scaling.factor,
        "rope_attention_factor": attention_factor,
        "trained_length": config.trained_length,
        "served_length": served_length(config, compression),
        "request_length": request_length,
        "dtype": options.dtype,
        "weight_dtype": options.weight_dtype,
        "kv_cache_dtype": options.kv_cache_dtype,
        "kv_compression": compression and compression.settings,
        "kept": compression and compression.summary(config, requests[0].prompt_capacity),
        "cache_bytes": _cache_bytes(options, requests[0]),
        "prefill_chunk": options.prefill_chunk,
        "sparse_prefill": options.sparse_prefill and dataclasses.asdict(options.sparse_prefill),
        "mesh": {axis: int(size) for axis, size in options.mesh.shape.items()},
        "devices": f"{options.mesh.size} x {options.mesh.devices.flat[0].device_kind}",
    }


def _cache_bytes(options: Options, request: Request) -> int:
    """Returns the bytes of the whole cache after prefill, counting replicated arrays once."""
    spec = request.cache_spec(options)
    spec = dataclasses.replace(spec, batch=spec.batch * request.num_samples)
    return spec.nbytes(options.config)


def warnings(options: Options, requests: Sequence[Request]) -> list[str]:
    """Returns notes for the user on options that have no effect, or have a cost."""
    return (
        _notes_on_cache(options)
        + _notes_on_scaling(options, requests)
        + _notes_on_sampling(options, requests[0].sampling)
    )


def _notes_on_sampling(options: Options, used: Sampling) -> list[str]:
    """Notes the sampling that the publisher suggests, if it is not the one in use."""
    suggested = dataclasses.replace(options.suggested, seed=used.seed)
    if suggested in (used, Sampling(seed=used.seed)):
        return []
    default = Sampling()
    fields = [
        f"{f.name} {getattr(suggested, f.name):g}"
        for f in dataclasses.fields(Sampling)
        if f.name != "seed" and getattr(suggested, f.name) != getattr(default, f.name)
    ]
    return [
        f"generation_config.json suggests {', '.join(fields)}, which is not what is used here; "
        "--sampling auto takes it"
    ]


def _notes_on_cache(options: Options) -> list[str]:
    found = []
    if options.kv_cache_dtype == "int4":
        found.append(
            "kv_cache_dtype int4 takes a little over half of int8's memory and costs accuracy: an "
            "entry is 13 times as far off; scripts/eval_perplexity.py --kv_cache_dtype int4 says "
            "what that comes to for a model and a text"
        )
    if options.compression and (warning := options.compression.warning(options.config)):
        found.append(warning)
    return found


def _notes_on_scaling(options: Options, requests: Sequence[Request]) -> list[str]:
    config = options.config
    kind, trained = config.rope_scaling.kind, config.trained_length
    fixed = kind in ("linear", "ntk", "yarn")
    if fixed and config.rope_scaling.factor == 1:
        return [f"rope_scaling {kind} of factor 1 changes nothing"]
    shortest = min(min(r.lengths[: r.num_real]) for r in requests)
    if shortest > trained:
        return []
    if kind in ("auto", "dynamic", "longrope"):
        return [f"rope_scaling {kind} leaves requests of up to {trained:,} tokens as they are"]
    if fixed:
        return [
            f"rope_scaling {kind} also applies to requests of up to {trained:,} tokens, which the "
            "model reads better without; --rope_scaling auto scales longer ones only"
        ]
    return []


def describe(configuration: dict[str, Any]) -> str:
    """Formats the result of `effective_config` as text."""
    c = configuration
    mesh = ",".join(f"{axis}={size}" for axis, size in c["mesh"].items())
    kept = f" ({c['kept']})" if c["kept"] else ""
    sparse = c["sparse_prefill"]
    sparse = f", sparse with alpha {sparse['alpha']:g}" if sparse else ""
    weights = c["dtype"] if c["weight_dtype"] == "auto" else f"int8 at {c['dtype']}"
    return "\n".join(
        (
            f"model      {c['model']} ({c['architecture']})",
            f"positions  rope {c['rope_kind']}, theta {c['rope_theta']:g}, factor "
            f"{c['rope_factor']:g}, attention factor {c['rope_attention_factor']:.6g}",
            f"length     trained for {c['trained_length']:,}, serves {c['served_length']:,}, "
            f"this request {c['request_length']:,} tokens",
            f"numbers    weights {weights}, KV cache {c['kv_cache_dtype']} of "
            f"{human_bytes(c['cache_bytes'])}{kept}, "
            f"prefill in chunks of {c['prefill_chunk']:,}{sparse}",
            f"devices    {c['devices']}, mesh {mesh}",
        )
    )


def summary(stats: Stats) -> str:
    """Formats the figures of a batch as text."""
    s = stats
    return "\n".join(
        (
            f"prompt     {s.prompt_tokens:,} tokens, {s.generated_tokens:,} generated",
            f"first      {s.time_to_first_token_seconds:.2f} s to the first token, compiling "
            "included",
            f"prefill    {s.prefill_seconds:.2f} s, {s.prefill_tokens_per_second:,.1f} tokens/s",
            *((f"attended   to {s.sparsity}",) if s.sparsity else ()),
            f"decode     {s.decode_seconds:.2f} s, {s.decode_tokens_per_second:,.1f} tokens/s in "
            f"{s.decode_steps:,} steps",
            f"compiling  {s.compile_seconds:.2f} s, {s.compilations} programs compiled",
            f"memory     {human_bytes(s.peak_memory_bytes)} at the peak",
        )
    )


def as_json(
    completions: Sequence[Completion], stats: Sequence[Stats], configuration: dict[str, Any]
) -> dict[str, Any]:
    """Returns a run's results, the combined stats of its batches, and its configuration."""
    return {
        "results": [
            {
                "prompt_tokens": c.prompt_tokens,
                "token_ids": list(c.token_ids),
                "text": c.text,
                "finish_reason": c.finish_reason,
            }
            for c in completions
        ],
        "stats": dataclasses.asdict(combine(stats)),
        "config": configuration,
    }


def combine(stats: Sequence[Stats]) -> Stats:
    """Combines the figures of batches that ran one after the other."""
    first, *_ = stats

    def total(name: str) -> Any:
        return sum(getattr(s, name) for s in stats)

    def rate(name: str, seconds: str) -> float:
        spent = total(seconds)
        done = sum(getattr(s, name) * getattr(s, seconds) for s in stats)
        return done / spent if spent else 0.0

    return dataclasses.replace(
        first,
        prompt_tokens=total("prompt_tokens"),
        generated_tokens=total("generated_tokens"),
        prefill_seconds=total("prefill_seconds"),
        prefill_tokens_per_second=rate("prefill_tokens_per_second", "prefill_seconds"),
        decode_seconds=total("decode_seconds"),
        decode_tokens_per_second=rate("decode_tokens_per_second", "decode_seconds"),
        decode_steps=total("decode_steps"),
        compile_seconds=total("compile_seconds"),
        compilations=total("compilations"),
        peak_memory_bytes=max(s.peak_memory_bytes for s in stats),
        sparsity=first.sparsity and sparsity.combine([s.sparsity for s in stats]),
    )
