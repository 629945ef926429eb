"""Flags that several programs share."""

from typing import Any

import jax
from absl import flags

from lsjax.cache import CACHE_DTYPES
from lsjax.distributed import multihost
from lsjax.inference.options import COMPUTE_DTYPES
from lsjax.nn.int8_weights import WEIGHT_DTYPES
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path


def define_model_flags() -> None:
    """Defines the flags that say which model runs, on which devices, and in which dtypes."""
    flags.DEFINE_string(
        "model_path",
        None,
        "Model folder (Hugging Face or converted). Default: the shipped model.",
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", *COMPUTE_DTYPES],
        "Dtype of weights and activations. auto: float32 on CPU, otherwise the checkpoint's.",
    )
    flags.DEFINE_enum(
        "weight_dtype",
        "auto",
        ["auto", *WEIGHT_DTYPES],
        "Dtype of weight matrices: int8, with a scale per output channel; auto: same as --dtype, "
        "or what a converted folder holds.",
    )
    flags.DEFINE_enum(
        "kv_cache_dtype",
        "auto",
        ["auto", *CACHE_DTYPES],
        "Dtype of the KV cache. auto: same as --dtype.",
    )
    flags.DEFINE_integer(
        "prefill_chunk",
        None,
        "Prompt tokens per prefill step, rounded up where a context axis splits them. Default: "
        "512 on CPU, otherwise 4096.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "kv_compression",
        "none",
        "KV cache compression: none; razor, where only retrieval heads keep all tokens; "
        "streaming_llm, which keeps the first and the last tokens; or settings as JSON, such as "
        '\'{"kind": "razor", "window": 2000}\'.',
    )
    define_sparse_prefill_flag()
    define_mesh_flags()


def define_sparse_prefill_flag() -> None:
    """Defines the flag that says which keys a prompt attends to."""
    flags.DEFINE_string(
        "sparse_prefill",
        "none",
        "Blocks of keys that a prompt attends to: none for all; a number alpha, such as 0.05, for "
        "those with at least that share of the largest estimated weight; or settings as JSON, such "
        'as \'{"alpha": 0.05, "first_layers": 2}\'. Decoding attends to everything.',
    )


def define_rope_scaling_flag() -> None:
    """Defines the flag that overrides config.json's RoPE scaling."""
    flags.DEFINE_string(
        "rope_scaling",
        None,
        "RoPE scaling: JSON as in config.json; off; or auto, which scales only requests longer "
        "than the trained length. Default: config.json's.",
    )


def define_progress_flag() -> None:
    """Defines the flag that has a program's progress written as JSON; run_program heeds it."""
    flags.DEFINE_string(
        "progress_json",
        None,
        "File or pipe to write progress to, a JSON object per line: phase, done, total, unit, "
        "seconds and remaining_seconds. Default: none.",
    )


def define_document_cache_flags() -> None:
    """Defines the flags that say where documents are kept that have been read."""
    flags.DEFINE_string(
        "document_cache",
        None,
        "Folder that keeps what has been read, for later runs: each reads only what is new, and "
        "one that is stopped is gone on with. Default: none.",
    )
    flags.DEFINE_float(
        "document_cache_gib",
        100.0,
        "GiB that --document_cache may take; documents used least recently are deleted.",
        lower_bound=0.0,
    )


def document_cache_options() -> dict[str, Any]:
    """Returns define_document_cache_flags' values as arguments of LanguageModel.read.

    Raises:
      UserError: a size is given, but no folder; or several processes run.
    """
    if flags.FLAGS.document_cache and jax.distributed.is_initialized():
        raise UserError("--document_cache is for one process so far; leave it out.")
    if flags.FLAGS["document_cache_gib"].present and not flags.FLAGS.document_cache:
        raise UserError("--document_cache_gib bounds --document_cache; give that, too.")
    return {n: flags.FLAGS[n].value for n in ("document_cache", "document_cache_gib")}


def define_mesh_flags() -> None:
    """Defines the flags that say which devices of which processes a program uses."""
    flags.DEFINE_string(
        "mesh",
        "",
        "Devices per mesh axis (data, context, model), such as context=4,model=2. Default: one "
        "device.",
    )
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "Address of process 0 as host:port, where several processes run one model; auto under "
        "Slurm, MPI, GKE or on a TPU pod, which provide it.",
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Number of processes; required with --coordinator_address unless it is auto.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Index of this process, from 0; required with --coordinator_address unless it is auto.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "coordinator_timeout",
        300,
        "Seconds to wait for the other processes to connect.",
        lower_bound=1,
    )


def connect() -> None:
    """Connects to the other processes, if the flags name a coordinator.

    Raises:
      UserError: the flags do not fit together, or a process does not connect in time.
    """
    address, count, number = (
        flags.FLAGS[n].value for n in ("coordinator_address", "num_processes", "process_id")
    )
    if address:
        multihost.connect(address, count, number, flags.FLAGS.coordinator_timeout)
    elif count is not None or number is not None:
        raise UserError("num_processes and process_id go with coordinator_address; give it too.")


def model_options() -> dict[str, Any]:
    """Returns define_model_flags' values as arguments of inference.options.resolve_options."""
    names = ("dtype", "weight_dtype", "kv_cache_dtype", "kv_compression", "sparse_prefill")
    names += ("mesh", "prefill_chunk")
    path = flags.FLAGS.model_path or shipped_model_path()
    return {"path": path} | {n: flags.FLAGS[n].value for n in names}


def parse_lengths(words: list[str], flag: str = "lengths") -> list[int]:
    """Parses a flag's list of lengths in tokens.

    Raises:
      UserError: the list is empty, or an entry is not a whole number above 0.
    """
    wrong = [n for n in words if not n.isdecimal() or int(n) < 1]
    if wrong or not words:
        raise UserError(f"--{flag} takes numbers of tokens, as in 512,2048, not {wrong}.")
    return [int(n) for n in words]
