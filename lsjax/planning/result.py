"""Results of planning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lsjax.attention.dispatch import prefill_path
from lsjax.config import ModelConfig
from lsjax.planning.deployment import Deployment, MemoryUsage
from lsjax.planning.shared_document import DocumentPlan
from lsjax.planning.speed import Speed
from lsjax.planning.targets import Target
from lsjax.positions.dual_chunk import chunks_for
from lsjax.runtime.html import grid, table
from lsjax.runtime.memory import human_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model needs on a target.

    Attributes:
      config: model configuration.
      target: devices that were planned for.
      deployment: layout with the requested settings; settings not given are the best found.
      length: requested prompt length in tokens, or the longest that fits.
      programs: memory per device that "prefill" and "decode" need at that length, and "read" of a
        document.
      max_length: longest prompt that fits, in tokens; 0 if none does.
      limited_by: what limits max_length: "memory", or the model's "positions".
      recommended: best layout if every setting is free.
      reasons: sentences that say why that layout is recommended.
      table: prompt length -> memory per device of each program, in ascending order.
      speed: speed expected at `length`, calculated and not measured; None if the target's rates
        are unknown.
      compiled: whether `programs` and `max_length` come from the compiler instead of arithmetic.
      document: document that all prompts begin with; None for none. Lengths are then without it.
    """

    config: ModelConfig
    target: Target
    deployment: Deployment
    length: int
    programs: dict[str, MemoryUsage]
    max_length: int
    limited_by: str
    recommended: Deployment
    reasons: tuple[str, ...]
    table: dict[int, dict[str, MemoryUsage]]
    speed: Speed | None
    compiled: bool
    document: DocumentPlan | None = None

    @property
    def fits(self) -> bool:
        return fits(self.target, self.programs)

    @property
    def prefill_paths(self) -> tuple[str, str]:
        """What dense attention of prefill is in the plan's programs, and what devices would run.

        They differ where JAX asks a GPU that is not here; see dispatch.prefill_path.
        """
        c, d = self.config, self.deployment
        of_model = d.dtype, d.kv_cache_dtype, c.head_dim, c.alibi
        capability = self.target.capability
        ahead = self.compiled and self.target.name != "here"
        return tuple(
            prefill_path(self.target.platform, *of_model, asked)
            for asked in (0 if ahead else capability, capability)
        )

    @property
    def prefill_views(self) -> str | None:
        """What the views of dual chunk attention are in prefill as run; None without it."""
        d, (_, run) = self.deployment, self.prefill_paths
        chunks = chunks_for(self.config, d.span(d.document_length + self.length + d.output_length))
        if chunks is None:
            return None
        sizes = [
            d.prefill_chunk,
            *([d.cache_block] if d.kv_cache_dtype in ("int8", "int4") else []),
        ]
        alone = d.sizes["context"] == 1 and not d.document_length
        if run != "cuDNN" or (alone and all(map(chunks.holds_whole, sizes))):
            return "each of three views in a call of its own"
        return (
            "each of three views in a call of its own, and the blockwise loop for slots that only "
            "some queries see"
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as JSON data; memory is in bytes per device, lengths are in tokens."""
        return {
            "fits": self.fits,
            "max_length": self.max_length,
            "limited_by": self.limited_by,
            "recommended": _as_flags(self.recommended) | {"reasons": list(self.reasons)},
            "programs": _with_totals(self.programs, self.target),
            "model": self.config.architecture,
            "target": self.target.name,
            "devices": self.target.devices,
            "length": self.length,
            "settings": _as_flags(self.deployment),
            "document": self.document and dataclasses.asdict(self.document),
            "compiled": self.compiled,
            "prefill_attention": dict(zip(("planned", "run"), self.prefill_paths, strict=True))
            | {"views": self.prefill_views},
            "expected": self.speed and dataclasses.asdict(self.speed),
            "table": [
                {"length": n, "programs": _with_totals(needs, self.target)}
                for n, needs in self.table.items()
            ],
        }

    def _repr_html_(self) -> str:
        """Shows in a notebook what fits, and the bytes per device."""
        deployment = self.deployment
        source = "the compiler's" if self.compiled else "estimated"
        summary = {
            "model": f"{self.config.architecture} on {self.target.name}",
            "asked for": f"{self.length:,} tokens and {deployment.output_length:,} of output: "
            + ("fits" if self.fits else "does not fit"),
            "longest prompt": f"{self.max_length:,} tokens, limited by {self.limited_by}",
            "settings": ", ".join(f"{k} {v}" for k, v in _as_flags(deployment).items()),
        }
        if self.document:
            d = self.document
            summary["document"] = (
                f"{d.tokens:,} tokens, saved {human_bytes(d.saved_bytes)}, {d.questions:,} "
                "questions fit side by side"
            )
        if self.speed:
            summary["expected"] = (
                f"prefill {self.speed.prefill_seconds:,.3g} s, decode "
                f"{self.speed.decode_tokens_per_second:,.3g} tokens/s (not measured)"
            )
        rows = [
            (name, *map(human_bytes, (n.weights, n.cache, n.temporaries, n.total)))
            for name, n in self.programs.items()
        ]
        header = (f"per device, {source}", "weights", "KV cache", "temporaries", "total")
        return table(summary) + grid(header, rows)


def fits(target: Target, programs: Mapping[str, MemoryUsage]) -> bool:
    """Returns whether every program fits a device's memory."""
    return all(needs.total <= target.memory for needs in programs.values())


def _as_flags(deployment: Deployment) -> dict[str, Any]:
    return {
        "mesh": deployment.mesh_text,
        "dtype": deployment.dtype,
        "weight_dtype": deployment.weight_dtype,
        "kv_cache_dtype": deployment.kv_cache_dtype,
        "kv_compression": deployment.compression and deployment.compression.settings,
        "sparse_prefill": deployment.sparse_prefill
        and dataclasses.asdict(deployment.sparse_prefill),
        "prefill_chunk": deployment.prefill_chunk,
        "max_batch_size": deployment.batch,
        "max_output_length": deployment.output_length,
    }


def _with_totals(programs: Mapping[str, MemoryUsage], target: Target) -> dict[str, dict[str, int]]:
    return {
        name: dataclasses.asdict(n) | {"total": n.total, "capacity": target.memory}
        for name, n in programs.items()
    }
