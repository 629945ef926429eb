"""Finds a model's retrieval heads for --kv_compression=razor; needed once per model.

For a model with ALiBi it finds how far back each head can reach, which follows from its weights.

    python scripts/find_retrieval_heads.py --model_path /models/Qwen2.5-7B-Instruct --plot heads.png
"""

import dataclasses
import os
import sys

import numpy as np
from absl import flags
from tqdm import tqdm

from lsjax.cli.flags import define_model_flags, define_rope_scaling_flag, model_options
from lsjax.cli.program import run_program
from lsjax.compression import HEAD_FILE, RazorConfig, choose, write_bounds, write_scores
from lsjax.compression.alibi_span import alibi_spans, score_bounds
from lsjax.evals.plots import plot_heads
from lsjax.evals.retrieval_heads import REPEATS, find_heads, repeated_text
from lsjax.language_model import LanguageModel, load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import check_writable

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_model_flags()
    flags.DEFINE_integer(
        "length",
        None,
        f"Number of random tokens, which are repeated {REPEATS} times. Default: 2,500, or as many "
        "as the model supports.",
        lower_bound=2,
    )
    flags.DEFINE_list(
        "token_id_range",
        None,
        "First and last token id to draw from, such as 100,200. Default: the middle half of the "
        "vocabulary.",
    )
    flags.DEFINE_integer("seed", 0, "Random seed for the tokens.")
    flags.DEFINE_float(
        "induction",
        RazorConfig.induction,
        "Share of KV heads to list that have the highest induction scores.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_float(
        "echo",
        RazorConfig.echo,
        "Share of KV heads to list that have the highest echo scores.",
        lower_bound=0,
        upper_bound=1,
    )
    define_rope_scaling_flag()
    flags.DEFINE_string(
        "output", None, f"File to write the scores to. Default: {HEAD_FILE} in the model folder."
    )
    flags.DEFINE_string("plot", None, "PNG file to draw the heat map in.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    options = model_options()
    if options.pop("kv_compression") != "none":
        raise UserError("heads are found in the uncompressed model; leave --kv_compression out.")
    if options.pop("sparse_prefill") != "none":
        raise UserError("heads are found with all their weights; leave --sparse_prefill out.")
    model = load(**options, rope_scaling=FLAGS.rope_scaling)
    output = FLAGS.output or os.path.join(model.options.folder, HEAD_FILE)
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
    for row, head in np.argwhere(chosen):
        layer, own = config.attention_layers[row], slice(head * group, (head + 1) * group)
        best = scores.induction[row, own].max(), scores.echo[row, own].max()
        print(f"layer {layer:>3}, KV head {head:>3}: induction {best[0]:.3f}, echo {best[1]:.3f}")
    print(f"scores written to {output}")
    if FLAGS.plot:
        maps = {}
        for name, rows in dataclasses.asdict(scores).items():
            maps[f"{name} score"] = np.full((config.num_layers, config.num_heads), np.nan)
            maps[f"{name} score"][list(config.attention_layers)] = rows
        plot_heads(maps, FLAGS.plot)


def _find_reaches(model: LanguageModel, output: str) -> None:
    for flag in ("length", "token_id_range", "seed", "induction", "echo", "rope_scaling"):
        if FLAGS[flag].present:
            raise UserError(
                f"--{flag} is for models that rotate; with ALiBi a head's reach follows from its "
                "weights. Leave it out."
            )
    config = model.config
    bounds = score_bounds(config, model.params)
    write_bounds(output, config, bounds)
    found = alibi_spans(config, bounds, RazorConfig.epsilon)
    print(f"tokens that KV heads reach back, for weights of {RazorConfig.epsilon} beyond:")
    for layer, row in enumerate(np.sort(found, axis=1)):
        print(f"layer {layer:>3}: {row[0]:,.0f} to {row[-1]:,.0f}, half of them up to "
              f"{np.median(row):,.0f}")  # fmt: skip
    print(f"bounds of scores written to {output}")
    if FLAGS.plot:
        plot_heads({"log2 of the reach": np.log2(found)}, FLAGS.plot)


def _ids(vocab_size: int) -> tuple[int, int]:
    """Returns the first and the last token id to draw from."""
    given = FLAGS.token_id_range
    if given is None:
        return vocab_size // 4, 3 * vocab_size // 4
    if len(given) != 2 or not all(i.isdecimal() for i in given):
        raise UserError(
            f"--token_id_range takes a first and a last id, as in 100,200, not {','.join(given)}."
        )
    first, last = map(int, given)
    if not first <= last < vocab_size:
        raise UserError(
            f"--token_id_range {first},{last} are not in order within 0,{vocab_size - 1}."
        )
    return first, last


def _first(model: LanguageModel) -> int:
    """Returns the BOS token, which texts begin with, or without one an EOS token."""
    eos = min(model.options.eos_token_ids, default=0)
    bos = model.tokenizer.bos_id
    return eos if bos is None else bos


def program() -> None:
    run_program(main, define_flags)
