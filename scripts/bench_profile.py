"""Says what the time of prefill and decode goes to on a CPU, by part of the model.

    python scripts/bench_profile.py --model_path SmolLM2 --prompt_length 8064 --weight_dtype int8

JAX's profiler times each operation of a second request; the first one compiles. An operation
belongs to the part that its `op_name` in the compiled program says. Its time is the median of its
runs times their number, since a shared machine makes one wait now and then.
"""

import collections
import os
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags

import lsjax
from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.cli.flags import define_model_flags, model_options
from lsjax.cli.program import run_program
from lsjax.inference.generate import Timing, generate
from lsjax.inference.request import batches
from lsjax.runtime.errors import UserError

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "config",
    None,
    "config.json of a model shape to measure with random weights, instead of --model_path.",
)
flags.DEFINE_integer("prompt_length", 2048, "Length in tokens of the random prompt.")
flags.DEFINE_integer("output_length", 33, "Number of tokens to generate.", lower_bound=2)

# An operation belongs to the first part whose pattern its op_name holds.
_PARTS = {
    "products of the layers": r"/attn/(q|k|v|o|qkv)/|/mlp/(gate|up|down|gate_up)/",
    "product of the head": r"logits",
    "attention: products": r"/attn/.*dot_general",
    "attention: softmax, widening, merging": r"/attn/while/body",
    "attention: rotation, layouts, writing the cache": r"/attn/",
    "silu": r"/mlp/",
    "norms": r"norm",
    "the rest": r"",
}
_PROGRAMS = {"jit__prefill": "prefill", "jit__decode": "decode"}
_OPERAND = re.compile(r"%([\w.\-]+)")
_CONTAINER = re.compile(r"[}\])] (while|conditional|call)\(")


def main(_) -> None:
    if FLAGS.config and FLAGS.model_path:
        raise UserError("give --model_path or --config, not both.")
    options = model_options()
    with tempfile.TemporaryDirectory() as work:
        # XLA reads its flags when JAX first runs something. It writes out what it compiles, and
        # nothing that is found compiled.
        dump = Path(work) / "programs"
        dumping = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dumping}"
        jax.config.update("jax_enable_compilation_cache", False)
        if FLAGS.config:
            options["path"] = work
            write_random_checkpoint(FLAGS.config, work)
        timing = _traced_request(options, dump)
        times = _times(dump)
    for program, wall, runs in (
        ("prefill", timing.prefill, 1),
        ("decode of a token", timing.decode, timing.steps),
    ):
        parts = times[program.split()[0]]
        total = sum(parts.values())
        print(f"{program}: {wall / runs * 1e3:,.1f} ms, operations {total / runs * 1e3:,.1f} ms")
        for part in _PARTS:
            print(f"{parts[part] / runs * 1e3:10,.2f} ms {parts[part] / total:6.1%}  {part}")


def _traced_request(options: dict, trace: Path) -> Timing:
    """Runs one request twice, the second time with a trace, and returns that one's times."""
    lm = lsjax.load(**options)
    if jax.default_backend() != "cpu":
        raise UserError("bench_profile.py measures CPUs alone; set JAX_PLATFORMS=cpu.")
    ids = np.random.default_rng(0).integers(0, lm.config.vocab_size, FLAGS.prompt_length)
    (request,) = batches(
        lm.options,
        [tuple(ids.tolist())],
        FLAGS.output_length,
        ignore_eos=True,
        allow_untrained_length=True,
    )
    for _ in generate(lm.engine, lm.params, request, Timing()):
        pass
    timing = Timing()
    with jax.profiler.trace(str(trace)):
        for _ in generate(lm.engine, lm.params, request, timing):
            pass
    return timing


def _times(dump: Path) -> dict[str, collections.Counter]:
    """Returns the seconds of each part, by program."""
    runs = collections.defaultdict(list)
    for program, op, seconds in _operations(dump):
        runs[program, op].append(seconds)
    programs = {program for program, _ in runs if program[0] in _PROGRAMS}
    op_names = {program: _op_names(dump, *program) for program in programs}
    times = {name: collections.Counter() for name in _PROGRAMS.values()}
    for (program, op), seconds in runs.items():
        # Loops and branches have no name: their operations are counted one by one.
        if (name := op_names.get(program, {}).get(op)) is not None:
            part = next(part for part, pattern in _PARTS.items() if re.search(pattern, name))
            times[_PROGRAMS[program[0]]][part] += statistics.median(seconds) * len(seconds)
    return times


def _operations(dump: Path) -> Iterator[tuple[tuple[str, int], str, float]]:
    """Yields the program (its name and number), name and seconds of all operations that ran."""
    (trace,) = dump.glob("**/*.xplane.pb")
    begun, ended = {}, {}
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for event in (event for line in plane.lines if "XLA" in line.name for event in line.events):
            stats = dict(event.stats)
            if "hlo_op" in stats:
                program = stats["hlo_module"], stats["program_id"]
                begun[stats["_p"]] = program, stats["hlo_op"], event.start_ns
            elif "_c" in stats:
                ended[stats["_c"]] = event.start_ns
    for key in begun.keys() & ended.keys():
        program, op, start = begun[key]
        yield program, op, (ended[key] - start) / 1e9


def _op_names(dump: Path, module: str, number: int) -> dict[str, str]:
    """Returns the op_name of each operation of a compiled program, loops and branches apart.

    XLA's own products on a CPU have lost theirs: they take that of the operation that reads them.
    """
    (path,) = dump.glob(f"module_{number:04}.{module}.*after_optimizations.txt")
    names, waiting = {}, {}
    for line in path.read_text().splitlines():
        if not (found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)", line)):
            waiting = {}  # another computation begins
            continue
        op, rest = found.groups()
        given = re.search(r'op_name="([^"]*/[^"]*)"', rest)
        read = [x for operand in _OPERAND.findall(rest) for x in waiting.pop(operand, [])]
        if given:
            names[op] = given[1]
            names |= {x: given[1] + names[x] for x in read}
        else:
            names[op] = "/dot_general" if "__ynn_fusion" in rest or " dot(" in rest else ""
            waiting[op] = [op, *read]
        if _CONTAINER.search(rest):
            del names[op]
    return names


if __name__ == "__main__":
    run_program(main, define_model_flags)
