"""Compares decode speed with and without prompt lookup, on the same prompts.

    python scripts/bench_lookup.py --model_path /models/X --input_texts page.txt

Both run in turn in one process, and the table says whether they gave the same tokens, as they must.
With --config instead of --model_path the weights are random: such a model soon generates the same
few tokens over and over, which serves as text that repeats itself.
"""

import contextlib
import json
import statistics
import sys
import tempfile

import numpy as np
from absl import flags

import lsjax
from lsjax.checkpoint.random_weights import write_random_checkpoint
from lsjax.cli import inputs
from lsjax.cli.flags import define_model_flags, model_options, parse_lengths
from lsjax.cli.program import run_program
from lsjax.inference.request import check_lookup
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import check_writable, write_atomically

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "config",
    None,
    "config.json of a model shape to measure with random weights, instead of --model_path.",
)
flags.DEFINE_multi_string(
    "input_texts",
    [],
    "Prompts: each value is a text, a UTF-8 file, or - for the standard input. Repeat the flag for "
    "several. Default: one prompt of random tokens.",
)
flags.DEFINE_bool(
    "is_chat_model", False, "Render each of --input_texts with the model's chat template."
)
flags.DEFINE_integer(
    "prompt_length", 2048, "Length in tokens of the random prompt, used without --input_texts."
)
flags.DEFINE_integer("output_length", 257, "Number of tokens to generate.", lower_bound=2)
flags.DEFINE_list(
    "prompt_lookup_num_tokens",
    ["3", "7", "15"],
    "Numbers of tokens drafted per decode step to measure; 0 is always measured.",
)
flags.DEFINE_integer(
    "repeats", 3, "Number of measurements per number of drafted tokens; the median is reported."
)
flags.DEFINE_string("output_json", None, "File to write the figures to, as JSON.")


def main(_) -> None:
    drafts = parse_lengths(FLAGS.prompt_lookup_num_tokens, "prompt_lookup_num_tokens")
    for count in drafts:
        check_lookup(count, lsjax.Sampling())
    if FLAGS.output_json:
        check_writable(FLAGS.output_json)
    if FLAGS.config and FLAGS.model_path:
        raise UserError("give --model_path or --config, not both.")
    with contextlib.ExitStack() as stack:
        options = model_options()
        if FLAGS.config:
            options["path"] = stack.enter_context(tempfile.TemporaryDirectory())
            write_random_checkpoint(FLAGS.config, options["path"])
        lm = lsjax.load(**options)
    texts = inputs.read_texts(FLAGS.input_texts)
    prompts = [_encode(lm, text) for text in texts]
    rng = np.random.default_rng(0)
    prompts = prompts or [rng.integers(0, lm.config.vocab_size, FLAGS.prompt_length).tolist()]
    figures = [_measure(lm, prompt, drafts) for prompt in prompts]
    if FLAGS.output_json:
        write_atomically(FLAGS.output_json, json.dumps(figures, indent=1) + "\n")


def _encode(lm: lsjax.LanguageModel, text: str) -> list[int]:
    if not FLAGS.is_chat_model:
        return lm.tokenizer.encode(text)
    chat = lm.tokenizer.render_chat(inputs.as_chat(text))
    return lm.tokenizer.encode(chat, add_special_tokens=False)


def _measure(lm: lsjax.LanguageModel, prompt: list[int], drafts: list[int]) -> dict:
    """Measures one prompt; prints and returns the figures by number of tokens drafted."""
    runs = {count: [] for count in (0, *drafts)}
    for _ in range(FLAGS.repeats + 1):
        for count, done in runs.items():
            done += lm.generate(
                [prompt],
                FLAGS.output_length,
                ignore_eos=True,
                allow_untrained_length=True,
                prompt_lookup_num_tokens=count,
            )
    print(f"prompt of {len(prompt):,} tokens, {FLAGS.output_length:,} generated")
    print("drafted   tokens/s    ratio   tokens a step   same tokens")
    rows = {}
    for count, done in runs.items():
        warm = [c.stats for c in done[1:]]  # the first one compiles
        rate = statistics.median((FLAGS.output_length - 1) / s.decode_seconds for s in warm)
        rows[count] = {
            "tokens_per_second": rate,
            "ratio": rate / (rows[0]["tokens_per_second"] if rows else rate),
            "tokens_per_step": (FLAGS.output_length - 1) / warm[0].decode_steps,
            "same_tokens": all(c.token_ids == runs[0][0].token_ids for c in done),
        }
        row = rows[count]
        print(
            f"{count:7} {rate:10.2f} {row['ratio']:7.2f}x {row['tokens_per_step']:15.2f}   "
            f"{'yes' if row['same_tokens'] else 'NO'}"
        )
    return rows


if __name__ == "__main__":
    sys.exit(run_program(main, define_model_flags))
