"""The configuration of a training run, checked before any weight is read."""

import dataclasses
import os
from typing import Any

from jax.sharding import Mesh

from lsjax.checkpoint import read_model_config
from lsjax.config import ModelConfig
from lsjax.distributed.sharding import check_fits_mesh, make_mesh
from lsjax.families import parse_config, read_raw_config
from lsjax.inference.options import COMPUTE_DTYPES, end_of_documents, one_of
from lsjax.inference.request import way_out
from lsjax.positions.dual_chunk import chunks_for
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note
from lsjax.tokenizer import has_tokenizer, load_tokenizer
from lsjax.training.batch import length_unit
from lsjax.training.documents import Vocabulary
from lsjax.training.optimizer import OptimizerConfig
from lsjax.training.scaled_config import scaled_config


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """The model that training starts from.

    Attributes:
      weights: the folder that weights are read from; None for random weights.
      hf_config: the object in config.json, with the effective RoPE scaling.
      config: hf_config, parsed.
      sidecar_files: the folder whose tokenizer and other files are exported with the model, or
        None.
    """

    weights: str | None
    hf_config: dict[str, Any]
    config: ModelConfig
    sidecar_files: str | None

    def vocabulary(self) -> Vocabulary:
        """Returns the vocabulary and tokenizer that the data are read with."""
        tokenizer = None
        if self.sidecar_files and has_tokenizer(self.sidecar_files):
            tokenizer = load_tokenizer(self.sidecar_files)
        end = end_of_documents(self.sidecar_files, self.config, tokenizer)
        if end is None and tokenizer is not None:
            note("neither config.json nor the tokenizer names an end: documents have none.")
        return Vocabulary(self.config.vocab_size, end, tokenizer)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, and how they are batched.

    Attributes:
      data: training files; see open_corpus.
      seq_length: tokens per sequence.
      batch_size: sequences per forward and backward pass.
      gradient_accumulation_steps: batches whose gradients are summed before the weights change.
      pose_max_position: PoSE spreads positions over 0 .. pose_max_position - 1; equal to
        seq_length for no gaps.
      seed: random seed for the order of documents, PoSE gaps and random weights.
    """

    data: tuple[str, ...]
    seq_length: int
    batch_size: int
    gradient_accumulation_steps: int
    pose_max_position: int
    seed: int


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is written during training. It may change when a run is resumed.

    Attributes:
      save_every: steps between checkpoints.
      keep_checkpoints: number of latest checkpoints to keep.
      log_every: steps between log lines.
      eval_every: steps between evaluations; 0 evaluates at the start and at the end only.
      eval_data: held-out files; empty for no evaluation.
      eval_lengths: lengths in tokens that held-out documents are cut to.
    """

    save_every: int
    keep_checkpoints: int
    log_every: int
    eval_every: int
    eval_data: tuple[str, ...]
    eval_lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Attributes:
      source: the model to start from.
      data: the training data.
      optimizer: the optimizer and its schedule.
      dtype: dtype of the computation; weights are float32.
      mesh: the devices.
      logging: what is written during training.
      output_dir: the run's folder.
    """

    source: ModelSource
    data: DataConfig
    optimizer: OptimizerConfig
    dtype: str
    mesh: Mesh
    logging: LoggingConfig
    output_dir: str

    def resume_fingerprint(self) -> dict[str, Any]:
        """Returns everything that the weights depend on, as values that JSON can hold.

        All of it must stay the same when a run is resumed. The mesh is left out and may change,
        which changes rounding.
        """
        source, optimizer = self.source, dataclasses.asdict(self.optimizer)
        if self.optimizer.schedule == "constant":
            del optimizer["steps"]  # more steps do not change those already done
        return {
            "model_path": source.weights and os.path.realpath(source.weights),
            "tokenizer_path": source.sidecar_files and os.path.realpath(source.sidecar_files),
            "config": source.hf_config,
            **dataclasses.asdict(self.data),
            "data": [[os.path.realpath(p), os.path.getsize(p)] for p in self.data.data],
            **optimizer,
            "dtype": self.dtype,
        }


def find_model_source(
    model_path: str | None, config: str | None, tokenizer_path: str | None, rope_scaling: str | None
) -> ModelSource:
    """Finds the model that the flags name.

    Args:
      model_path: a model folder, Hugging Face or converted; not allowed with config.
      config: a config.json, for random weights.
      tokenizer_path: a folder with a tokenizer; only allowed with config.
      rope_scaling: JSON as in config.json, "off", or None for config.json's own scaling.

    Raises:
      UserError: the arguments do not go together, or what they name is wrong.
    """
    if config:
        if model_path:
            raise UserError(
                "model_path starts from a model's weights and config from random ones; give one."
            )
        if tokenizer_path and not has_tokenizer(tokenizer_path):
            raise UserError(f"{tokenizer_path} holds no tokenizer; name a model's folder.")
        raw = read_raw_config(config)
        return ModelSource(None, *scaled_config(raw, rope_scaling), tokenizer_path)
    if tokenizer_path:
        raise UserError("tokenizer_path goes with config; a model's folder has its own tokenizer.")
    folder = os.fspath(model_path or "")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; give a model's, Hugging Face or converted.")
    raw = read_raw_config(os.path.join(folder, "config.json"))
    tied = read_model_config(folder).tie_embeddings
    if tied != parse_config(raw).tie_embeddings:  # the stored weights decide
        raw["tie_word_embeddings"] = tied
    return ModelSource(folder, *scaled_config(raw, rope_scaling), folder)


def resolve_training(
    source: ModelSource,
    data: DataConfig,
    optimizer: OptimizerConfig,
    logging: LoggingConfig,
    *,
    dtype: str,
    mesh: str,
    output_dir: str,
    allow_untrained_length: bool = False,
) -> TrainingConfig:
    """Checks that the parts of a run fit together, and resolves dtype and mesh.

    Args:
      source, data, optimizer, logging, output_dir: see TrainingConfig.
      dtype: float32, bfloat16 or auto (float32 on CPU, otherwise bfloat16).
      mesh: devices per axis, see parse_mesh.
      allow_untrained_length: whether lengths past the one that the model serves are allowed.

    Raises:
      UserError: the parts do not fit together, or a length is not allowed.
    """
    devices, config = make_mesh(mesh), source.config
    check_fits_mesh(config, devices.shape)
    rows, context = devices.shape["data"], devices.shape["context"]
    if data.batch_size % rows:
        raise UserError(f"batch_size must be a multiple of data={rows}, not {data.batch_size}.")
    for name, length in (
        ("seq_length", data.seq_length),
        *(("eval_lengths", n) for n in _lengths(logging)),
    ):
        unit = length_unit(length, context)
        if length % unit:
            raise UserError(
                f"{name} must be a multiple of {unit} to be split over context={context}, not "
                f"{length}."
            )
    if data.pose_max_position < data.seq_length:
        raise UserError(
            f"pose_max_position must be at least seq_length = {data.seq_length:,}, not "
            f"{data.pose_max_position:,}."
        )
    if data.pose_max_position > data.seq_length and config.alibi:
        raise UserError(
            f"{config.architecture} has ALiBi, which knows no positions: leave out "
            "pose_max_position."
        )
    longest = max(data.pose_max_position, *_lengths(logging), 0)
    if chunks_for(config, longest):
        raise UserError(
            f"training reaches {longest} tokens, but dual chunk attention is for reading: train up "
            f'to {config.trained_length} tokens, or with rope_scaling "off".'
        )
    if longest > config.served_length and not allow_untrained_length:
        raise UserError(f"training reaches {longest} tokens, but {way_out(config, longest)}")
    if optimizer.warmup_steps >= optimizer.steps:
        raise UserError(
            f"warmup_steps must be fewer than the {optimizer.steps} steps, not "
            f"{optimizer.warmup_steps}."
        )
    if dtype == "auto":
        dtype = "float32" if devices.devices.flat[0].platform == "cpu" else "bfloat16"
    return TrainingConfig(
        source,
        data,
        optimizer,
        one_of("dtype", dtype, COMPUTE_DTYPES),
        devices,
        logging,
        output_dir,
    )


def _lengths(logging: LoggingConfig) -> tuple[int, ...]:
    return logging.eval_lengths if logging.eval_data else ()
