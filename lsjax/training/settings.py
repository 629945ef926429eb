"""What a run of training is: decided and checked before a weight is read."""

import dataclasses
import os
from typing import Any

from jax.sharding import Mesh

from lsjax.checkpoint import read_model_config
from lsjax.config import ModelConfig
from lsjax.errors import UserError
from lsjax.families import parse_config
from lsjax.files import read_json
from lsjax.notes import note
from lsjax.requests import check_exact_length, way_out
from lsjax.settings import COMPUTE_DTYPES, end_of_documents, one_of
from lsjax.sharding import check_fits_mesh, make_mesh
from lsjax.shipped import shipped_model_path
from lsjax.tokenizer import has_tokenizer, load_tokenizer
from lsjax.training.batch import length_unit
from lsjax.training.documents import Vocabulary
from lsjax.training.optimiser import Optimisation
from lsjax.training.scaled_config import scaled_config


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model that training starts from.

    Attributes:
      weights: the folder that they are read from; None for random ones.
      hf_config: the object in config.json, with the rope scaling in force.
      config: the same, parsed.
      carried: the folder whose tokenizer and other files go with what is exported, or None.
    """

    weights: str | None
    hf_config: dict[str, Any]
    config: ModelConfig
    carried: str | None

    def vocabulary(self) -> Vocabulary:
        """What reads the data."""
        tokenizer = None
        if self.carried and has_tokenizer(self.carried):
            tokenizer = load_tokenizer(self.carried)
        end = end_of_documents(self.carried, self.config, tokenizer)
        if end is None and tokenizer is not None:
            note("neither config.json nor the tokenizer names an end: documents have none.")
        return Vocabulary(self.config.vocab_size, end, tokenizer)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a step reads.

    Attributes:
      data: files; see open_corpus.
      length: tokens of a row.
      rows: worked on together.
      accumulate: so many times, one after the other, before the weights change.
      span: positions are spread over up to so many; `length` where they are not.
      seed: of the documents' order, of gaps, and of random weights.
    """

    data: tuple[str, ...]
    length: int
    rows: int
    accumulate: int
    span: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is written while training goes on; may differ when a run goes on.

    Attributes:
      save_every: steps between checkpoints.
      keep: of the last checkpoints.
      log_every: steps between lines of the log.
      eval_every: steps between evaluations; 0 for the first and the last step only.
      eval_data: held-out files; none for no evaluation.
      eval_lengths: tokens that held-out documents are cut to.
    """

    save_every: int
    keep: int
    log_every: int
    eval_every: int
    eval_data: tuple[str, ...]
    eval_lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run of training.

    Attributes:
      origin: the model.
      rows: the data.
      optimisation: the steps.
      dtype: that is computed in; weights are float32.
      mesh: the devices.
      watch: what is written meanwhile.
      output_dir: where to.
    """

    origin: Origin
    rows: Rows
    optimisation: Optimisation
    dtype: str
    mesh: Mesh
    watch: Watch
    output_dir: str

    def decisive(self) -> dict[str, Any]:
        """What the weights depend on, as JSON has it: all of it is to stay when a run goes on.

        The mesh may change, which changes rounding.
        """
        origin, optimisation = self.origin, dataclasses.asdict(self.optimisation)
        if self.optimisation.schedule == "constant":
            del optimisation["steps"]  # more of them change none of those taken
        return {
            "model_path": origin.weights and os.path.realpath(origin.weights),
            "tokenizer_path": origin.carried and os.path.realpath(origin.carried),
            "config": origin.hf_config,
            **dataclasses.asdict(self.rows),
            "data": [[os.path.realpath(p), os.path.getsize(p)] for p in self.rows.data],
            **optimisation,
            "dtype": self.dtype,
        }


def origin_of(
    model_path: str | None, config: str | None, tokenizer_path: str | None, rope_scaling: str | None
) -> Origin:
    """The model that flags name.

    Args:
      model_path: a folder, Hugging Face or converted; with neither it nor config, the shipped one.
      config: a config.json, for random weights.
      tokenizer_path: the folder of a tokenizer, with config.
      rope_scaling: JSON as in config.json, "off", or None for what config.json says.

    Raises:
      UserError: they do not go together, or what they name is wrong.
    """
    if config:
        if model_path:
            raise UserError(
                "model_path starts from a model's weights and config from random ones; give one."
            )
        if tokenizer_path and not has_tokenizer(tokenizer_path):
            raise UserError(f"{tokenizer_path} holds no tokenizer; name a model's folder.")
        return Origin(None, *scaled_config(_read(config), rope_scaling), tokenizer_path)
    if tokenizer_path:
        raise UserError("tokenizer_path goes with config; a model's folder has its own tokenizer.")
    folder = os.fspath(model_path or shipped_model_path())
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; give a model's, Hugging Face or converted.")
    raw, tied = _read(os.path.join(folder, "config.json")), read_model_config(folder).tie_embeddings
    if tied != parse_config(raw).tie_embeddings:  # as its weights are
        raw["tie_word_embeddings"] = tied
    return Origin(folder, *scaled_config(raw, rope_scaling), folder)


def settle(
    origin: Origin,
    rows: Rows,
    optimisation: Optimisation,
    watch: Watch,
    *,
    dtype: str,
    mesh: str,
    output_dir: str,
    allow_untrained_length: bool = False,
) -> Settings:
    """Checks what the parts of a run are to each other.

    Args:
      origin, rows, optimisation, watch, output_dir: see Settings.
      dtype: float32, bfloat16, or auto: float32 on a CPU.
      mesh: devices by axis, see parse_mesh.
      allow_untrained_length: train past the length that the model is meant for.

    Raises:
      UserError: they do not go together.
    """
    devices, config = make_mesh(mesh), origin.config
    check_fits_mesh(config, devices.shape)
    data, context = devices.shape["data"], devices.shape["context"]
    if rows.rows % data:
        raise UserError(f"rows must be a multiple of data={data}, not {rows.rows}.")
    for name, length in (("length", rows.length), *(("eval_lengths", n) for n in _lengths(watch))):
        unit = length_unit(length, context)
        if length % unit:
            raise UserError(
                f"{name} must be a multiple of {unit} to be dealt out over context={context}, not "
                f"{length}."
            )
    if rows.span < rows.length:
        raise UserError(
            f"position_span must be at least the length of {rows.length:,}, not {rows.span:,}."
        )
    if rows.span > rows.length and config.alibi:
        raise UserError(
            f"{config.architecture} has ALiBi, which knows no positions: leave out position_span."
        )
    longest = max(rows.span, *_lengths(watch), 0)
    check_exact_length(config, longest)
    if longest > config.served_length and not allow_untrained_length:
        raise UserError(f"training reaches {longest} tokens, but {way_out(config, longest)}")
    if optimisation.warmup >= optimisation.steps:
        raise UserError(
            f"warmup must be shorter than the {optimisation.steps} steps, not "
            f"{optimisation.warmup}."
        )
    if dtype == "auto":
        dtype = "float32" if devices.devices.flat[0].platform == "cpu" else "bfloat16"
    return Settings(
        origin,
        rows,
        optimisation,
        one_of("dtype", dtype, COMPUTE_DTYPES),
        devices,
        watch,
        output_dir,
    )


def _lengths(watch: Watch) -> tuple[int, ...]:
    return watch.eval_lengths if watch.eval_data else ()


def _read(file: str) -> Any:
    try:
        return read_json(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; a model folder holds config.json.") from None
