"""Trains a model on long texts.

    python scripts/train.py --model_path /models/Qwen2.5-0.5B --data books/*.txt --length 65536 \
        --steps 1000 --learning_rate 1e-5 --mesh context=8 --output_dir /runs/long \
        --rope_scaling '{"rope_type": "yarn", "factor": 4.0}'

    python scripts/train.py --recipe passkey --output_dir /tmp/passkey

The same command goes on with a run that has stopped. SIGTERM or SIGINT: the step is finished and
everything saved; exit status 128 + the signal's number. Documents of token files end with the first
eos_token_id of config.json, which is put behind texts. The trained model is output_dir/model.
Needs the extra `train` (optax, matplotlib).
"""

import signal
import sys

from absl import flags

from lsjax import cli
from lsjax.compilation import enable_persistent_cache
from lsjax.errors import UserError
from lsjax.settings import COMPUTE_DTYPES

FLAGS = flags.FLAGS

flags.DEFINE_string("output_dir", None, "The run's folder; a run in it goes on.", required=True)
flags.DEFINE_string(
    "model_path", None, "Model folder (Hugging Face, or converted); the shipped one if not."
)
flags.DEFINE_enum(
    "recipe",
    None,
    ["passkey", "passkey_alibi"],
    "Make the model that comes with the package, or its twin with ALiBi, as a new folder.",
)
flags.DEFINE_string("config", None, "A config.json: start from random weights.")
flags.DEFINE_string("tokenizer_path", None, "With config: the folder of a tokenizer.")
flags.DEFINE_multi_string(
    "data", [], "A text, *.jsonl or *.npy file; further words are further ones."
)
flags.DEFINE_multi_string("eval_data", [], "Held-out files of the same kinds; may be repeated.")
flags.DEFINE_integer("length", 4096, "Tokens of a row.", lower_bound=2)
flags.DEFINE_integer("rows", 1, "Rows worked on together.", lower_bound=1)
flags.DEFINE_integer("accumulate", 1, "Times rows, before the weights change.", lower_bound=1)
flags.DEFINE_integer(
    "position_span",
    None,
    "Spread the positions of each piece of a document over up to so many, by one gap (PoSE).",
)
flags.DEFINE_integer("steps", None, "How many in all.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1e-5, "The highest.", lower_bound=0.0)
flags.DEFINE_integer("warmup", 0, "Steps until it is reached.", lower_bound=0)
flags.DEFINE_enum("schedule", "cosine", ["cosine", "linear", "constant"], "Of it, after them.")
flags.DEFINE_float("weight_decay", 0.1, "Of matrices.", lower_bound=0.0)
flags.DEFINE_float("clip", 1.0, "Gradients' greatest norm; 0 for any.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of the data's order, gaps and random weights.", lower_bound=0)
flags.DEFINE_enum("dtype", "auto", ["auto", *COMPUTE_DTYPES], "Computed in; weights are float32.")
flags.DEFINE_string(
    "rope_scaling", None, "JSON as in config.json, or off; config.json's if not given."
)
flags.DEFINE_bool(
    "allow_untrained_length", False, "Train past the length that the model is meant for."
)
flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("keep", 3, "Checkpoints kept.", lower_bound=1)
flags.DEFINE_integer("log_every", 1, "Steps between lines of the log.", lower_bound=1)
flags.DEFINE_integer("eval_every", 0, "Steps between evaluations; 0: first and last.", 0)
flags.DEFINE_list("eval_lengths", [], "Tokens that held-out documents are cut to; length if not.")
cli.define_mesh_flags()


def main(argv: list[str]) -> int:
    if FLAGS.recipe:
        _make_shipped()
        return 0
    training = cli.extra("train", "lsjax.training.loop")
    cli.extra("train", "matplotlib")  # which is met when the first curve is drawn
    settings = _settings(argv[1:])
    enable_persistent_cache()
    if asked := training.train(settings):
        name = signal.Signals(asked).name
        print(f"{name}: everything is saved in {FLAGS.output_dir}; the same command goes on.")
        return 128 + asked
    print(f"done: the model is in {FLAGS.output_dir}/{training.MODEL}")
    return 0


def _make_shipped() -> None:
    """What --recipe asks for."""
    shipped = cli.extra("train", "lsjax.shipped.training")
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    others = {flag.name for flag in own if flag.present} - {"recipe", "output_dir", "seed"}
    if others:
        names = ", ".join(f"--{name}" for name in sorted(others))
        raise UserError(f"--recipe says all but --seed; leave out {names}.")
    shipped.make(FLAGS.recipe, FLAGS.output_dir, shipped.Settings(seed=FLAGS.seed))


def _settings(words: list[str]):
    """What the flags say."""
    from lsjax.training.optimiser import Optimisation
    from lsjax.training.settings import Rows, Watch, origin_of, settle

    if FLAGS.steps is None:
        raise UserError("give the number of --steps.")
    f, length = FLAGS, FLAGS.length
    eval_lengths = cli.lengths(f.eval_lengths or [str(length)], "eval_lengths")
    if f.eval_lengths and not f.eval_data:
        raise UserError("--eval_lengths goes with --eval_data.")
    return settle(
        origin_of(f.model_path, f.config, f.tokenizer_path, f.rope_scaling),
        Rows((*f.data, *words), length, f.rows, f.accumulate, f.position_span or length, f.seed),
        Optimisation(f.steps, f.learning_rate, f.warmup, f.schedule, f.weight_decay, f.clip),
        Watch(
            f.save_every, f.keep, f.log_every, f.eval_every, tuple(f.eval_data), tuple(eval_lengths)
        ),
        dtype=f.dtype,
        mesh=f.mesh,
        output_dir=f.output_dir,
        allow_untrained_length=f.allow_untrained_length,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main, words=True))
