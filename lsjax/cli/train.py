"""Trains a model on long texts.

    python scripts/train.py --model_path /models/Qwen2.5-0.5B --data books/*.txt \
        --seq_length 65536 --steps 1000 --learning_rate 1e-5 --mesh context=8 \
        --output_dir /runs/long --rope_scaling '{"rope_type": "yarn", "factor": 4.0}'

    python scripts/train.py --recipe passkey --output_dir /tmp/passkey

The same command resumes a run that was stopped. On SIGTERM or SIGINT the current step is finished
and everything is saved; the exit status is 128 + the signal's number. The first eos_token_id of
config.json separates the documents of token files and is appended to texts. The trained model is
written to output_dir/model. Needs the extra `train` (optax, matplotlib).
"""

import signal
import sys

from absl import flags

from lsjax.cli.flags import define_mesh_flags, define_progress_flag, parse_lengths
from lsjax.cli.program import import_extra, run_program
from lsjax.inference.options import COMPUTE_DTYPES
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.shipped import shipped_model_path

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_progress_flag()
    flags.DEFINE_string(
        "output_dir",
        None,
        "Folder of the run; a run that is already in it continues.",
        required=True,
    )
    flags.DEFINE_string(
        "model_path",
        None,
        "Model folder to start from (Hugging Face or converted). Default: the shipped model.",
    )
    flags.DEFINE_enum(
        "recipe",
        None,
        ["passkey", "passkey_alibi"],
        "Train a shipped model again from scratch: passkey, or its ALiBi twin.",
    )
    flags.DEFINE_string("config", None, "config.json of a model to train from random weights.")
    flags.DEFINE_string("tokenizer_path", None, "Folder of the tokenizer to use with --config.")
    flags.DEFINE_multi_string(
        "data",
        [],
        "Training files: UTF-8 texts, *.jsonl or *.npy. Words after the flags are further files.",
    )
    flags.DEFINE_multi_string(
        "eval_data", [], "Held-out files of the same kinds; repeat the flag for several."
    )
    flags.DEFINE_integer("seq_length", 4096, "Tokens per training sequence.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 1, "Sequences per forward and backward pass.", lower_bound=1)
    flags.DEFINE_integer(
        "gradient_accumulation_steps",
        1,
        "Batches whose gradients are summed before the weights change.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "pose_max_position",
        None,
        "Train with positions up to this one by leaving a random gap in each document (PoSE). "
        "Default: no gap.",
    )
    flags.DEFINE_integer("steps", None, "Total number of training steps.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 1e-5, "Peak learning rate.", lower_bound=0.0)
    flags.DEFINE_integer(
        "warmup_steps", 0, "Steps over which the learning rate rises to its peak.", lower_bound=0
    )
    flags.DEFINE_enum(
        "schedule",
        "cosine",
        ["cosine", "linear", "constant"],
        "How the learning rate falls after the warm-up.",
    )
    flags.DEFINE_float(
        "weight_decay", 0.1, "Weight decay (AdamW), applied to matrices only.", lower_bound=0.0
    )
    flags.DEFINE_float(
        "max_grad_norm",
        1.0,
        "Norm that gradients are clipped to; 0 turns clipping off.",
        lower_bound=0.0,
    )
    flags.DEFINE_integer(
        "seed", 0, "Random seed for data order, PoSE gaps and initial weights.", lower_bound=0
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", *COMPUTE_DTYPES],
        "Dtype of the computation; master weights are float32. auto: float32 on CPU, otherwise "
        "bfloat16.",
    )
    flags.DEFINE_string(
        "rope_scaling",
        None,
        "RoPE scaling to train with: JSON as in config.json, or off. Default: config.json's.",
    )
    flags.DEFINE_bool(
        "allow_untrained_length", False, "Allow sequences longer than the model supports."
    )
    flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.", lower_bound=1)
    flags.DEFINE_integer(
        "keep_checkpoints", 3, "Number of latest checkpoints to keep.", lower_bound=1
    )
    flags.DEFINE_integer("log_every", 1, "Steps between log lines.", lower_bound=1)
    flags.DEFINE_integer(
        "eval_every",
        0,
        "Steps between evaluations; 0 evaluates at the start and at the end only.",
        lower_bound=0,
    )
    flags.DEFINE_list(
        "eval_lengths",
        [],
        "Lengths in tokens that held-out documents are cut to. Default: --seq_length.",
    )
    define_mesh_flags()


def main(argv: list[str]) -> int:
    if FLAGS.recipe:
        _make_shipped()
        return 0
    training = import_extra("train", "lsjax.training.loop")
    import_extra("train", "matplotlib")  # else it fails only when the first curve is drawn
    settings = _settings(argv[1:])
    enable_persistent_cache()
    if asked := training.train(settings):
        name = signal.Signals(asked).name
        print(f"{name}: everything is saved in {FLAGS.output_dir}; the same command goes on.")
        return 128 + asked
    print(f"done: the model is in {FLAGS.output_dir}/{training.MODEL}")
    return 0


def _make_shipped() -> None:
    """Trains the shipped model that --recipe names."""
    shipped = import_extra("train", "lsjax.shipped.training")
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    others = {flag.name for flag in own if flag.present} - {"recipe", "output_dir", "seed"}
    if others:
        names = ", ".join(f"--{name}" for name in sorted(others))
        raise UserError(f"--recipe sets everything but --seed; leave out {names}.")
    shipped.make(FLAGS.recipe, FLAGS.output_dir, shipped.RecipeConfig(seed=FLAGS.seed))


def _settings(words: list[str]):
    """Returns the training configuration that the flags and words set."""
    from lsjax.training.config import (
        DataConfig,
        LoggingConfig,
        find_model_source,
        resolve_training,
    )
    from lsjax.training.optimizer import OptimizerConfig

    if FLAGS.steps is None:
        raise UserError("give the number of --steps.")
    f, length = FLAGS, FLAGS.seq_length
    eval_lengths = parse_lengths(f.eval_lengths or [str(length)], "eval_lengths")
    if f.eval_lengths and not f.eval_data:
        raise UserError("--eval_lengths goes with --eval_data.")
    return resolve_training(
        find_model_source(
            f.model_path or (None if f.config else shipped_model_path()),
            f.config,
            f.tokenizer_path,
            f.rope_scaling,
        ),
        DataConfig(
            (*f.data, *words),
            length,
            f.batch_size,
            f.gradient_accumulation_steps,
            f.pose_max_position or length,
            f.seed,
        ),
        OptimizerConfig(
            f.steps, f.learning_rate, f.warmup_steps, f.schedule, f.weight_decay, f.max_grad_norm
        ),
        LoggingConfig(
            f.save_every,
            f.keep_checkpoints,
            f.log_every,
            f.eval_every,
            tuple(f.eval_data),
            tuple(eval_lengths),
        ),
        dtype=f.dtype,
        mesh=f.mesh,
        output_dir=f.output_dir,
        allow_untrained_length=f.allow_untrained_length,
    )


def program() -> None:
    run_program(main, define_flags, words=True)
