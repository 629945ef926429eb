"""Measures prefill and decode speed and peak memory by prompt length.

    python scripts/bench_generate.py --config examples/qwen2.5-0.5b.json --prompt_lengths 2048,8192
    python scripts/bench_generate.py --model_path Qwen3-0.6B --weights float32,float32+int8 \
        --transformers_python /path/to/python --transformers_dtypes float32,bfloat16
    python scripts/bench_generate.py --model_path SmolLM2 --llama_cpp_python /path/to/python \
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf

With --config the weights are random and written on the spot. All sides load the same files. Each
measurement runs in its own process, so that its peak memory is its own, after a run that is not
counted (in transformers, of 64 tokens). The sides run in turn, and each one's ratio to the first is
printed, below what the machine reaches in a product (float32 on a CPU, else bfloat16) and in
copying memory.
"""

import json
import subprocess
import sys
import tempfile

from absl import flags

from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.cli.program import run_program
from lsjax.runtime.errors import UserError
from lsjax.runtime.memory import human_bytes
from lsjax.runtime.text_files import check_writable, write_atomically

FLAGS = flags.FLAGS

flags.DEFINE_string("config", None, "config.json of a model shape, to measure random weights.")
flags.DEFINE_string("model_path", None, "Model folder (Hugging Face) to measure.")
flags.DEFINE_list("prompt_lengths", ["2048", "8192"], "Prompt lengths in tokens.")
flags.DEFINE_integer("output_length", 33, "Number of tokens to generate.", lower_bound=2)
flags.DEFINE_list(
    "weights",
    ["float32"],
    "Dtypes of lsjax to measure in turn: float32, bfloat16, or with int8 weights float32+int8, "
    "bfloat16+int8.",
)
flags.DEFINE_enum(
    "kv_cache_dtype",
    "auto",
    ["auto", "float32", "bfloat16", "int8"],
    "Dtype of the KV cache in lsjax. auto: that of the activations.",
)
flags.DEFINE_integer(
    "prefill_chunk",
    None,
    "Prompt tokens per prefill step in lsjax. Default: 512 on CPU, otherwise 4096.",
    lower_bound=1,
)
flags.DEFINE_string(
    "mesh",
    "",
    "Devices per mesh axis (data, context, model) in lsjax, such as context=4,model=2. Default: "
    "one device.",
)
flags.DEFINE_integer(
    "repeats", 1, "Number of measurements per side and prompt length; the median is reported."
)
flags.DEFINE_string(
    "transformers_python",
    None,
    "Python executable that has torch and transformers, to measure transformers as well.",
)
flags.DEFINE_list("transformers_dtypes", ["float32"], "Dtypes of transformers to measure in turn.")
flags.DEFINE_string(
    "llama_cpp_python",
    None,
    "Python executable that has llama-cpp-python, to measure llama.cpp on --gguf as well.",
)
flags.DEFINE_string("gguf", None, "GGUF file of the model, for --llama_cpp_python.")
flags.DEFINE_string("output_json", None, "File to write the figures to, as JSON.")

_WEIGHTS = ("float32", "bfloat16", "float32+int8", "bfloat16+int8")
_FIGURES = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")

_LSJAX = """
import json, sys
import lsjax
from lsjax.inference.generate import Timing, generate
from lsjax.runtime.memory import peak_memory_bytes
from lsjax.inference.request import batches
import numpy as np
folder, weights, length, output, cache, chunk, mesh = json.loads(sys.argv[1])
dtype, _, weight_dtype = weights.partition("+")
lm = lsjax.load(
    folder,
    dtype=dtype,
    weight_dtype=weight_dtype or "auto",
    kv_cache_dtype=cache,
    mesh=mesh,
    prefill_chunk=chunk,
)
prompt = tuple(np.random.default_rng(0).integers(0, lm.config.vocab_size, length).tolist())
(request,) = batches(
    lm.options, [prompt], output, ignore_eos=True, allow_untrained_length=True
)
for _ in range(2):  # XLA prepares some kernels when they first run
    t = Timing()
    for _ in generate(lm.engine, lm.params, request, t):
        pass
print(json.dumps({
    "prefill_tokens_per_second": length / t.prefill,
    "decode_tokens_per_second": t.decoded / t.decode,
    "peak_memory_bytes": peak_memory_bytes(),
}))
"""

_TRANSFORMERS = """
import json, resource, sys, time
import torch, transformers
folder, dtype, length, output = json.loads(sys.argv[1])[:4]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
on_gpu = torch.cuda.is_available()
model = model.to("cuda" if on_gpu else "cpu")
ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
wait = torch.cuda.synchronize if on_gpu else lambda: None
with torch.inference_mode():
    model(ids[:, :64], logits_to_keep=1)
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    wait()
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(output - 1):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    wait()
    decode = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({
    "prefill_tokens_per_second": length / prefill,
    "decode_tokens_per_second": (output - 1) / decode,
    "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak,
}))
"""

_LLAMA_CPP = """
import json, os, resource, sys, time
import llama_cpp, numpy as np
_, gguf, length, output = json.loads(sys.argv[1])[:4]
model = llama_cpp.Llama(
    gguf, n_ctx=length + output, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(),
    verbose=False,
)
ids = np.random.default_rng(0).integers(0, model.n_vocab(), length).tolist()
start = time.perf_counter()
model.eval(ids)
prefill = time.perf_counter() - start
start = time.perf_counter()
for _ in range(output - 1):
    model.eval([model.sample(temp=0.0)])
decode = time.perf_counter() - start
print(json.dumps({
    "prefill_tokens_per_second": length / prefill,
    "decode_tokens_per_second": (output - 1) / decode,
    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""

# Not in this process, which would keep a GPU's memory from the sides.
_RATES = """
import json, time
import jax, jax.numpy as jnp
from lsjax.planning.speed import measured_rates
def seconds(f, *x):
    jax.block_until_ready(f(*x))
    start = time.perf_counter()
    jax.block_until_ready([f(*x) for _ in range(10)])
    return (time.perf_counter() - start) / 10
if jax.default_backend() == "cpu":
    rates = measured_rates(1)
    print(json.dumps(["float32", rates.flops, rates.bandwidth]))
else:
    a, x = jnp.ones((8192, 8192), "bfloat16"), jnp.ones(2**28)
    flops = 2 * 8192**3 / seconds(jax.jit(jnp.matmul), a, a)
    print(json.dumps(["bfloat16", flops, 2 * x.nbytes / seconds(jax.jit(jnp.negative), x)]))
"""


def main(argv: list[str]) -> None:
    del argv
    if (FLAGS.config is None) == (FLAGS.model_path is None):
        raise UserError("give either --config, for random weights, or --model_path.")
    if unknown := set(FLAGS.weights) - set(_WEIGHTS):
        raise UserError(f"--weights takes {', '.join(_WEIGHTS)}, not {sorted(unknown)}.")
    if (FLAGS.llama_cpp_python is None) != (FLAGS.gguf is None):
        raise UserError("--llama_cpp_python and --gguf go together: give both or neither.")
    if FLAGS.output_json:
        check_writable(FLAGS.output_json)
    sides = {f"lsjax {dtype}": (sys.executable, _LSJAX, dtype) for dtype in FLAGS.weights}
    if FLAGS.transformers_python:
        for dtype in FLAGS.transformers_dtypes:
            sides[f"transformers {dtype}"] = (FLAGS.transformers_python, _TRANSFORMERS, dtype)
    if FLAGS.llama_cpp_python:
        sides["llama.cpp"] = (FLAGS.llama_cpp_python, _LLAMA_CPP, FLAGS.gguf)
    done = subprocess.run([sys.executable, "-c", _RATES], check=True, capture_output=True)
    dtype, flops, bandwidth = json.loads(done.stdout)
    print(
        f"this machine: {flops / 1e9:,.0f} GFLOP/s of {dtype} products, "
        f"{bandwidth / 1e9:,.1f} GB/s copied"
    )
    rows = []
    heads = "prefill tok/s", "ratio", "decode tok/s", "ratio", "peak memory", "ratio"
    print(f"{'side':<22}{'prompt':>8}" + "".join(f"{head:>14}" for head in heads))
    with tempfile.TemporaryDirectory() as folder:
        if FLAGS.config:
            write_random_checkpoint(FLAGS.config, folder)
        for length in map(int, FLAGS.prompt_lengths):
            runs = {side: [] for side in sides}
            for _ in range(FLAGS.repeats):
                for side, how in sides.items():
                    runs[side].append(_measure(*how, FLAGS.model_path or folder, length))
            medians = [_median(figures) for figures in runs.values()]
            for side, figures in zip(sides, medians, strict=True):
                rows.append({"side": side, "prompt_length": length, **figures})
                prefill, decode, memory = (figures[f] / medians[0][f] for f in _FIGURES)
                print(
                    f"{side:<22}{length:>8,}"
                    f"{figures['prefill_tokens_per_second']:>14,.1f}{prefill:>14.2f}"
                    f"{figures['decode_tokens_per_second']:>14,.2f}{decode:>14.2f}"
                    f"{human_bytes(figures['peak_memory_bytes']):>14}{memory:>14.2f}",
                    flush=True,
                )
    if FLAGS.output_json:
        write_atomically(FLAGS.output_json, json.dumps(rows, indent=1) + "\n")


def _measure(python: str, program: str, dtype: str, folder: str, length: int) -> dict[str, float]:
    settings = (
        folder,
        dtype,
        length,
        FLAGS.output_length,
        FLAGS.kv_cache_dtype,
        FLAGS.prefill_chunk,
        FLAGS.mesh,
    )
    command = [python, "-c", program, json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        ended = f"it ended with {result.returncode} and no message"
        last = (result.stderr.strip().splitlines() or [ended])[-1]
        raise UserError(f"measuring with {python} failed: {last}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: sorted(r[name] for r in runs)[len(runs) // 2] for name in runs[0]}


if __name__ == "__main__":
    sys.exit(run_program(main))
