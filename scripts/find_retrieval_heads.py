"""Finds the heads of a model that retrieve, for --kv_compression=razor; once for each model.

Of a model with ALiBi it finds how far each head can reach, which its weights say.

python scripts/find_retrieval_heads.py --model_path /models/Qwen2.5-7B-Instruct --plot heads.png
"""

import dataclasses
import os
import sys

import numpy as np
from absl import flags
from tqdm import tqdm

from lsjax import cli
from lsjax.compilation import enable_persistent_cache
from lsjax.compression import HEAD_FILE, Razor, choose, write_bounds, write_scores
from lsjax.compression.find import REPEATS, find_heads, repeated_text
from lsjax.compression.reach import reaches, score_bounds
from lsjax.errors import UserError
from lsjax.evals.plots import plot_heads
from lsjax.files import check_writable
from lsjax.language_model import LanguageModel, load

FLAGS = flags.FLAGS

cli.define_model_flags()
flags.DEFINE_integer(
    "length",
    None,
    f"Random tokens, which are repeated {REPEATS} times: 2,500, or as many as the model serves.",
    lower_bound=2,
)
flags.DEFINE_list(
    "ids",
    None,
    "First and last id to draw from; the middle half of the vocabulary if not given.",
)
flags.DEFINE_integer("seed", 0, "Of the random tokens.")
flags.DEFINE_float("induction", Razor.induction, "Share of KV heads shown for this score.", 0, 1)
flags.DEFINE_float("echo", Razor.echo, "Share of KV heads shown for this score.", 0, 1)
flags.DEFINE_string("rope_scaling", None, "JSON as in config.json, off, or auto.")
flags.DEFINE_string("output", None, f"Write the scores here; {HEAD_FILE} beside the model if not.")
flags.DEFINE_string("plot", None, "Write a heat map here, as PNG.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    options = cli.model_options()
    if options.pop("kv_compression") != "none":
        raise UserError("heads are found in the uncompressed model; leave --kv_compression out.")
    model = load(**options, rope_scaling=FLAGS.rope_scaling)
    output = FLAGS.output or os.path.join(model.settings.folder, HEAD_FILE)
    for path in filter(None, (output, FLAGS.plot)):
        check_writable(path)
    config = model.config
    if config.alibi:
        _find_reaches(model, output)
        return
    most = (config.served_length - 1) // REPEATS
    length = FLAGS.length or min(2500, most)
    if length > most:
        raise UserError(
            f"{length} tokens {REPEATS} times are more than the {config.served_length} that the "
            f"model serves; use --length {most} or less, or a --rope_scaling."
        )
    text = repeated_text(_first(model), *_ids(config.vocab_size), length, FLAGS.seed)
    with tqdm(total=config.num_layers, unit="layer", file=sys.stderr) as bar:
        scores = find_heads(model.engine, model.params, text, bar.update)
    write_scores(output, config, scores)
    chosen = choose(scores, config.num_kv_heads, FLAGS.induction, FLAGS.echo)
    print(f"{length:,} tokens, {REPEATS} times; {chosen.sum()} of {chosen.size} KV heads retrieve:")
    group = config.num_heads // config.num_kv_heads
    for layer, head in np.argwhere(chosen):
        own = slice(head * group, (head + 1) * group)
        best = scores.induction[layer, own].max(), scores.echo[layer, own].max()
        print(f"layer {layer:>3}, KV head {head:>3}: induction {best[0]:.3f}, echo {best[1]:.3f}")
    print(f"scores written to {output}")
    if FLAGS.plot:
        scores = {f"{name} score": rows for name, rows in dataclasses.asdict(scores).items()}
        plot_heads(scores, FLAGS.plot)


def _find_reaches(model: LanguageModel, output: str) -> None:
    for flag in ("length", "ids", "seed", "induction", "echo", "rope_scaling"):
        if FLAGS[flag].present:
            raise UserError(
                f"--{flag} is for models that rotate; with ALiBi a head's reach follows from its "
                "weights. Leave it out."
            )
    config = model.config
    bounds = score_bounds(config, model.params)
    write_bounds(output, config, bounds)
    found = reaches(config, bounds, Razor.epsilon)
    print(f"tokens that KV heads reach back, for weights of {Razor.epsilon} beyond:")
    for layer, row in enumerate(np.sort(found, axis=1)):
        print(f"layer {layer:>3}: {row[0]:,.0f} to {row[-1]:,.0f}, half of them up to "
              f"{np.median(row):,.0f}")  # fmt: skip
    print(f"bounds of scores written to {output}")
    if FLAGS.plot:
        plot_heads({"log2 of the reach": np.log2(found)}, FLAGS.plot)


def _ids(vocab_size: int) -> tuple[int, int]:
    """First and last id to draw from."""
    given = FLAGS.ids
    if given is None:
        return vocab_size // 4, 3 * vocab_size // 4
    if len(given) != 2 or not all(i.isdecimal() for i in given):
        raise UserError(f"--ids takes a first and a last id, as in 100,200, not {','.join(given)}.")
    first, last = map(int, given)
    if not first <= last < vocab_size:
        raise UserError(f"--ids {first},{last} are not in order within 0,{vocab_size - 1}.")
    return first, last


def _first(model: LanguageModel) -> int:
    """A special token, as texts begin with, or end with where they begin with none."""
    eos = min(model.settings.eos_token_ids, default=0)
    bos = model.tokenizer.bos_id
    return eos if bos is None else bos


if __name__ == "__main__":
    sys.exit(cli.run(main))
