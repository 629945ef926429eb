"""What a model takes of each device at a length, before a weight is loaded.

    python scripts/plan.py --config config.json --target v5e:2x4 --mesh context=8 \
        --max_input_length 1048576 --max_output_length 1024

compiles the programs that run_pa would run, with the target's own compiler, on a machine that has
no such hardware (pip install 'lsjax[ahead]').
"""

import dataclasses
import json
import sys

import jax
from absl import flags

from lsjax import cli
from lsjax.cache import CACHE_DTYPES, whole_stripes
from lsjax.errors import UserError
from lsjax.families import read_config
from lsjax.files import check_writable, write_atomically
from lsjax.plan import compile_for, find_target, target_mesh
from lsjax.report import human_bytes
from lsjax.requests import cache_spec
from lsjax.settings import COMPUTE_DTYPES
from lsjax.sharding import check_fits_mesh, parse_mesh

FLAGS = flags.FLAGS

flags.DEFINE_string("config", None, "A config.json, or a model folder.", required=True)
flags.DEFINE_string("target", None, "Devices, as in v5e:2x4 or h100-80gb:8.", required=True)
flags.DEFINE_string("mesh", "", "Devices by axis (data, context, model): context=4,model=2.")
flags.DEFINE_integer("max_input_length", 131072, "Tokens of prompt.", lower_bound=1)
flags.DEFINE_integer("max_output_length", 256, "Tokens to generate.", lower_bound=1)
flags.DEFINE_integer("max_batch_size", 1, "Prompts answered together.", lower_bound=1)
flags.DEFINE_enum("dtype", "bfloat16", list(COMPUTE_DTYPES), "Of weights and activations.")
flags.DEFINE_enum("kv_cache_dtype", "int8", list(CACHE_DTYPES), "Of the KV cache.")
flags.DEFINE_integer("prefill_chunk", 4096, "Tokens of prompt run at once.", lower_bound=1)
flags.DEFINE_string("output_json", None, "Write the figures here.")


def main(_) -> None:
    jax.config.update("jax_platforms", "cpu")  # the devices that are here are not asked
    if FLAGS.output_json:
        check_writable(FLAGS.output_json)
    config, target = read_config(FLAGS.config), find_target(FLAGS.target)
    mesh = target_mesh(target, parse_mesh(FLAGS.mesh))
    check_fits_mesh(config, mesh)
    if FLAGS.max_batch_size % mesh.shape["data"]:
        raise UserError(f"max_batch_size {FLAGS.max_batch_size} cannot be split over the mesh.")
    chunk = whole_stripes(FLAGS.prefill_chunk, mesh.shape["context"])
    lengths = FLAGS.max_input_length, FLAGS.max_output_length
    spec = cache_spec(
        mesh, FLAGS.max_batch_size, *lengths, chunk, FLAGS.kv_cache_dtype, FLAGS.dtype
    )
    needs = compile_for(config, mesh, FLAGS.dtype, spec, chunk)
    fits = all(n.total <= target.memory for n in needs.values())
    print(
        f"{config.architecture}, {FLAGS.max_input_length:,} + {FLAGS.max_output_length:,} tokens, "
        f"{FLAGS.kv_cache_dtype} cache, on {mesh.size} of {target.name}: "
        f"{'fits' if fits else 'DOES NOT FIT'}"
    )
    print("a device        weights       cache  temporaries       total    of")
    for name, n in needs.items():
        parts = (n.weights, n.cache, n.temporaries, n.total, target.memory)
        print(f"{name:12}" + "".join(f"{human_bytes(b):>12}" for b in parts))
    if FLAGS.output_json:
        programs = {
            name: dataclasses.asdict(n) | {"total": n.total, "capacity": target.memory}
            for name, n in needs.items()
        }
        figures = {"fits": fits, "programs": programs}
        write_atomically(FLAGS.output_json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
