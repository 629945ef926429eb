"""Plans how long a text fits on given devices, before any weights are loaded.

    python scripts/plan.py --config /models/Qwen3-8B --target h100-80gb:1
    python scripts/plan.py --config config.json --target v5e:2x4 --compile

The target devices need not be present. Memory is estimated by arithmetic, at once. With --compile
it comes from the target's own compiler, which compiles the programs that run_pa would run; this
takes a minute or two (pip install 'lsjax[ahead]').
"""

import json

import jax
from absl import flags

from lsjax.cache import CACHE_DTYPES
from lsjax.cli.flags import define_rope_scaling_flag, define_sparse_prefill_flag
from lsjax.cli.program import make_cpu_devices, run_program
from lsjax.evals.plots import plot_plan
from lsjax.inference.options import COMPUTE_DTYPES
from lsjax.nn.int8_weights import WEIGHT_DTYPES
from lsjax.planning import Plan, plan
from lsjax.planning.shared_document import DocumentPlan
from lsjax.planning.speed import ASSUMED, DENSITY
from lsjax.runtime.memory import human_bytes
from lsjax.runtime.text_files import check_writable, write_atomically

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "config", None, "Model to plan for: a config.json or a model folder.", required=True
    )
    flags.DEFINE_string(
        "target",
        None,
        "Devices to plan for, such as v5e:2x4, h100-80gb:8, cpu:8 or here; an unknown name lists "
        "all of them.",
        required=True,
    )
    flags.DEFINE_integer(
        "max_input_length",
        None,
        "Prompt length in tokens, without the document. Default: the longest that fits.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "document_length",
        0,
        "Tokens of a document that all prompts begin with: read once, kept once. 0 for none.",
        lower_bound=0,
    )
    flags.DEFINE_float(
        "disk_gb_per_second",
        1.0,
        "Rate at which a saved document is read from disk, in GB (1e9 bytes) per second.",
        lower_bound=0.001,
    )
    flags.DEFINE_integer("max_output_length", 256, "Number of tokens to generate.", lower_bound=1)
    flags.DEFINE_integer("max_batch_size", 1, "Number of prompts answered together.", lower_bound=1)
    flags.DEFINE_string(
        "mesh", "", "Devices per mesh axis, such as context=4,model=2. Default: the best found."
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", *COMPUTE_DTYPES],
        "Dtype of weights and activations. auto: float32 on CPU, otherwise bfloat16.",
    )
    flags.DEFINE_enum(
        "weight_dtype",
        "auto",
        ["auto", *WEIGHT_DTYPES],
        "Dtype of weight matrices: int8, with a scale per output channel; auto: same as --dtype.",
    )
    flags.DEFINE_enum(
        "kv_cache_dtype",
        "auto",
        ["auto", *CACHE_DTYPES],
        "Dtype of the KV cache. auto: the best found.",
    )
    flags.DEFINE_string(
        "kv_compression",
        "none",
        "KV cache compression: none, razor, streaming_llm, or settings as JSON.",
    )
    flags.DEFINE_integer(
        "prefill_chunk",
        None,
        "Prompt tokens per prefill step. Default: the best found.",
        lower_bound=1,
    )
    define_sparse_prefill_flag()
    define_rope_scaling_flag()
    flags.DEFINE_bool(
        "allow_untrained_length", False, "Allow sequences longer than the model supports."
    )
    flags.DEFINE_bool(
        "compile", False, "Take memory figures from the target's compiler instead of estimating."
    )
    flags.DEFINE_string("output_json", None, "File to write the figures to, as JSON.")
    flags.DEFINE_string("plot", None, "PNG file to plot memory against length in.")


def main(_) -> None:
    if not FLAGS.target.startswith("here"):
        jax.config.update("jax_platforms", "cpu")  # leaves local accelerators untouched
    kind, _, count = FLAGS.target.partition(":")
    if FLAGS.compile and kind == "cpu" and count.isdecimal():
        make_cpu_devices(int(count))
    for file in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(file)
    options = (
        "max_input_length max_output_length max_batch_size mesh dtype weight_dtype kv_cache_dtype "
        "kv_compression sparse_prefill prefill_chunk rope_scaling allow_untrained_length "
        "document_length compile"
    )
    found = plan(
        FLAGS.config, FLAGS.target, **{name: FLAGS[name].value for name in options.split()}
    )
    _print(found)
    if FLAGS.output_json:
        write_atomically(FLAGS.output_json, json.dumps(found.as_json(), indent=1) + "\n")
    if FLAGS.plot:
        plot_plan(found.as_json(), FLAGS.plot)


def _print(p: Plan) -> None:
    deployment = p.deployment
    print(
        f"{p.config.architecture} on {p.target.name}: {p.length:,} tokens and "
        f"{deployment.output_length:,} of output {'fit' if p.fits else 'DO NOT FIT'}"
    )
    if p.document:
        _print_document(p.document)
    if p.max_length:
        print(f"longest    {p.max_length:,} tokens; more is kept out by {p.limited_by}")
    else:
        print("longest    not even one token fits")
    print(
        f"settings   --mesh {deployment.mesh_text} --dtype {deployment.dtype} "
        f"{deployment.weight_flag}--kv_cache_dtype {deployment.kv_cache_dtype} --prefill_chunk "
        f"{deployment.prefill_chunk}"
    )
    if p.recommended != deployment:
        r = p.recommended
        print(
            f"better     --mesh {r.mesh_text} --kv_cache_dtype {r.kv_cache_dtype} --prefill_chunk "
            f"{r.prefill_chunk}"
        )
    for reason in p.reasons:
        print(f"           {reason}")
    if p.speed:
        seconds = p.speed.sparse_prefill_seconds
        sparse = (
            ""
            if seconds is None
            else f" ({seconds:,.3g} s sparsely, at a density of {DENSITY:.0%})"
        )
        print(
            f"expected   prefill {p.speed.prefill_seconds:,.3g} s{sparse}, decode "
            f"{p.speed.decode_tokens_per_second:,.3g} tokens/s, {ASSUMED}; not measured"
        )
    planned, run = p.prefill_paths
    compiled = "" if planned == run else f"; compiled for this plan, without the GPU, to {planned}"
    prefill = "dense prefill" if p.deployment.sparse_prefill else "prefill"
    views = f", {p.prefill_views}" if p.prefill_views else ""
    print(f"attention  {prefill} by {run}{views}{compiled}")
    print(f"\nper device, {'compiled' if p.compiled else 'by arithmetic'}")
    print("program       weights       cache  temporaries       total        free          of")
    for name, n in p.programs.items():
        free = p.target.memory - n.total
        parts = [human_bytes(b) for b in (n.weights, n.cache, n.temporaries, n.total)]
        parts.append(human_bytes(free) if free >= 0 else f"-{human_bytes(-free)}")
        print(f"{name:9}" + "".join(f"{x:>12}" for x in (*parts, human_bytes(p.target.memory))))
    print("\n   tokens       cache     prefill      decode   (per device, by arithmetic)")
    for length, needs in p.table.items():
        prefill, decode = needs["prefill"], needs["decode"]
        parts = (decode.cache, prefill.total, decode.total)
        fits = "" if max(n.total for n in needs.values()) <= p.target.memory else "   does not fit"
        print(f"{length:9,}" + "".join(f"{human_bytes(b):>12}" for b in parts) + fits)


def _print_document(document: DocumentPlan) -> None:
    rate = FLAGS.disk_gb_per_second
    print(
        f"document   {document.tokens:,} tokens, {human_bytes(document.saved_bytes)} when saved, "
        f"loaded in {document.load_seconds(rate * 1e9):,.3g} s at {rate:g} GB/s"
    )
    print(f"questions  {document.questions:,} fit side by side, by arithmetic")


def program() -> None:
    run_program(main, define_flags)
