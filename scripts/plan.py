"""How long a text will a machine take, before a weight is loaded?

    python scripts/plan.py --config /models/Qwen3-8B --target h100-80gb:1
    python scripts/plan.py --config config.json --target v5e:2x4 --compile

The target need not be here. Bytes are arithmetic's, at once; with --compile they are those that
the target's own compiler gives of the programs that run_pa would run, in a minute or two
(pip install 'lsjax[ahead]').
"""

import json
import sys

import jax
from absl import flags

from lsjax import cli
from lsjax.cache import CACHE_DTYPES
from lsjax.evals.plots import plot_plan
from lsjax.files import check_writable, write_atomically
from lsjax.planning import Plan, plan
from lsjax.planning.speed import ASSUMED
from lsjax.report import human_bytes
from lsjax.settings import COMPUTE_DTYPES

FLAGS = flags.FLAGS

flags.DEFINE_string("config", None, "A config.json, or a model folder.", required=True)
flags.DEFINE_string(
    "target", None, "Devices: v5e:2x4, h100-80gb:8, cpu:8, here; a wrong one lists all kinds.",
    required=True,
)  # fmt: skip
flags.DEFINE_integer(
    "max_input_length", None, "Tokens of prompt; the longest that fits if not given.", lower_bound=1
)
flags.DEFINE_integer("max_output_length", 256, "Tokens to generate.", lower_bound=1)
flags.DEFINE_integer("max_batch_size", 1, "Prompts answered together.", lower_bound=1)
flags.DEFINE_string("mesh", "", "Devices by axis, as in context=4,model=2; the best if not given.")
flags.DEFINE_enum("dtype", "auto", ["auto", *COMPUTE_DTYPES], "Of weights and activations.")
flags.DEFINE_enum(
    "kv_cache_dtype", "auto", ["auto", *CACHE_DTYPES], "Of the KV cache; auto for the best."
)
flags.DEFINE_string(
    "kv_compression", "none", "razor, or its settings as JSON, as run_pa takes them; none."
)
flags.DEFINE_integer(
    "prefill_chunk", None, "Tokens of prompt run at once; the best if not given.", lower_bound=1
)
flags.DEFINE_string(
    "rope_scaling", None, "JSON as in config.json, off, or auto; config.json's if not given."
)
flags.DEFINE_bool(
    "allow_untrained_length", False, "Plan past the length that the model is meant for."
)
flags.DEFINE_bool("compile", False, "Ask the target's compiler, not arithmetic.")
flags.DEFINE_string("output_json", None, "Write the figures here.")
flags.DEFINE_string("plot", None, "Write a PNG of bytes by length here.")


def main(_) -> None:
    if not FLAGS.target.startswith("here"):
        jax.config.update("jax_platforms", "cpu")  # the devices that are here are not asked
    kind, _, count = FLAGS.target.partition(":")
    if FLAGS.compile and kind == "cpu" and count.isdecimal():
        cli.make_cpu_devices(int(count))
    for file in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(file)
    options = (
        "max_input_length max_output_length max_batch_size mesh dtype kv_cache_dtype "
        "kv_compression prefill_chunk rope_scaling allow_untrained_length compile"
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
    layout = p.layout
    print(
        f"{p.config.architecture} on {p.target.name}: {p.length:,} tokens and "
        f"{layout.output_length:,} of output {'fit' if p.fits else 'DO NOT FIT'}"
    )
    if p.max_length:
        print(f"longest    {p.max_length:,} tokens; more is kept out by {p.limited_by}")
    else:
        print("longest    not even one token fits")
    print(
        f"settings   --mesh {layout.mesh_text} --dtype {layout.dtype} --kv_cache_dtype "
        f"{layout.kv_cache_dtype} --prefill_chunk {layout.prefill_chunk}"
    )
    if p.recommended != layout:
        r = p.recommended
        print(
            f"better     --mesh {r.mesh_text} --kv_cache_dtype {r.kv_cache_dtype} --prefill_chunk "
            f"{r.prefill_chunk}"
        )
    for reason in p.reasons:
        print(f"           {reason}")
    if p.speed:
        print(
            f"expected   prefill {p.speed.prefill_seconds:,.3g} s, decode "
            f"{p.speed.decode_tokens_per_second:,.3g} tokens/s, {ASSUMED}; not measured"
        )
    print(f"\na device, {'compiled' if p.compiled else 'by arithmetic'}")
    print("program       weights       cache  temporaries       total        free          of")
    for name, n in p.programs.items():
        free = p.target.memory - n.total
        parts = [human_bytes(b) for b in (n.weights, n.cache, n.temporaries, n.total)]
        parts.append(human_bytes(free) if free >= 0 else f"-{human_bytes(-free)}")
        print(f"{name:9}" + "".join(f"{x:>12}" for x in (*parts, human_bytes(p.target.memory))))
    print("\n   tokens       cache     prefill      decode   (a device, by arithmetic)")
    for length, needs in p.table.items():
        prefill, decode = needs["prefill"], needs["decode"]
        parts = (decode.cache, prefill.total, decode.total)
        fits = "" if max(prefill.total, decode.total) <= p.target.memory else "   does not fit"
        print(f"{length:9,}" + "".join(f"{human_bytes(b):>12}" for b in parts) + fits)


if __name__ == "__main__":
    sys.exit(cli.run(main))
