"""A training run, from wherever it stopped to its last step.

A run's folder holds settings.json (what the weights depend on), checkpoints, log.jsonl, loss.png
and, at the end, the trained model as a Hugging Face folder.
"""

import json
import math
import os
import shutil
from typing import Any

from lsjax.checkpoint import checkpoint_bytes, export_parameters, load_parameters
from lsjax.compression import HEAD_FILE
from lsjax.distributed.multihost import broadcast_from_primary
from lsjax.nn.parameters import random_parameters
from lsjax.runtime.errors import UserError
from lsjax.runtime.progress import byte_bar, step_bar
from lsjax.runtime.text_files import write_atomically
from lsjax.training.checkpoints import Checkpoints
from lsjax.training.config import TrainingConfig
from lsjax.training.documents import open_corpus
from lsjax.training.evaluation import HeldOut, hold_out, losses_by_length
from lsjax.training.log import Log
from lsjax.training.meter import Meter
from lsjax.training.optimizer import learning_rates, make_optimizer
from lsjax.training.packing import DataPosition, Packer
from lsjax.training.step import Trainer, TrainState
from lsjax.training.stopping import StopSignal

MODEL = "model"  # the folder of the trained model


def train(settings: TrainingConfig) -> int:
    """Trains until the last step is done and the model is written, or a signal asks to stop.

    Returns:
      The number of the signal received, once everything is saved; 0 if the run is complete.

    Raises:
      UserError: the data are invalid, the folder holds another run, or the loss is not finite.
    """
    return _Run(settings)()


class _Run:
    def __init__(self, settings: TrainingConfig):
        s = self._settings = settings
        vocabulary = s.source.vocabulary()
        self._packer = Packer(
            open_corpus(s.data.data, vocabulary),
            s.data.seq_length,
            s.data.seed,
            s.data.pose_max_position,
        )
        self._held_out: HeldOut = {}
        if s.logging.eval_data:
            corpus = open_corpus(s.logging.eval_data, vocabulary)
            self._held_out = hold_out(corpus, s.logging.eval_lengths, s.data.batch_size)
        broadcast_from_primary(lambda: _open_folder(s))
        self._trainer = Trainer(s.source.config, s.mesh, make_optimizer(s.optimizer), s.dtype)
        self._rates = learning_rates(s.optimizer)

    def __call__(self) -> int:
        s = self._settings
        with (
            StopSignal() as stop,
            Checkpoints(self._path("checkpoints"), s.logging.keep_checkpoints) as checkpoints,
        ):
            step, state, data_position = self._begin(checkpoints)
            if step < s.optimizer.steps:
                broadcast_from_primary(self._drop_model)
            self._log = Log(s.output_dir, step)
            step, state = self._steps(step, state, data_position, stop, checkpoints)
            if received := stop.received() if step < s.optimizer.steps else 0:
                return received
        if not os.path.exists(self._path(MODEL)):
            source = s.source
            export_parameters(
                state.params,
                source.hf_config,
                source.sidecar_files,
                self._path(MODEL),
                without=(HEAD_FILE,),  # other weights have other retrieval heads
            )
        return 0

    def _drop_model(self) -> str:
        """Removes the exported model of a shorter run that is now being extended."""
        shutil.rmtree(self._path(MODEL), ignore_errors=True)
        return MODEL

    def _begin(self, checkpoints: Checkpoints) -> tuple[int, TrainState, DataPosition]:
        """Returns step, state and data position of the last checkpoint or of the initial model."""
        s, source, step = self._settings, self._settings.source, checkpoints.latest()
        if step is not None:
            return step, *checkpoints.restore(step, self._trainer.shapes())
        if source.weights is None:
            params = random_parameters(source.config, s.mesh, "float32", s.data.seed)
        else:
            with byte_bar("load", checkpoint_bytes(source.weights)) as bar:
                params = load_parameters(
                    source.weights, source.config, s.mesh, "float32", bar.update
                )
        return 0, self._trainer.init(params), DataPosition()

    def _steps(
        self,
        step: int,
        state: TrainState,
        data_position: DataPosition,
        stop: StopSignal,
        checkpoints: Checkpoints,
    ) -> tuple[int, TrainState]:
        s, logging, last = self._settings, self._settings.logging, self._settings.optimizer.steps
        shape = s.data.gradient_accumulation_steps, s.data.batch_size
        tables = self._trainer.tables(s.data.pose_max_position)
        meter = Meter(s.source.config, s.mesh.size)
        saved = step
        if step < last:
            batch, data_position = self._packer.take(data_position, *shape)
            if step == 0:
                self._evaluate(0, state)
        with step_bar(last, step) as bar:
            while step < last:
                state, metrics = self._trainer.step(state, batch, tables)
                taken, begins = batch, data_position
                batch, data_position = self._packer.take(
                    data_position, *shape
                )  # while the devices work
                loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
                meter.step(taken)
                step += 1
                bar.update()
                if not math.isfinite(loss + grad_norm):
                    raise UserError(
                        f"the loss of step {step} is {loss} and the norm of its gradients "
                        f"{grad_norm}; the last saved step is {saved}. Start a new run "
                        "with a lower learning_rate."
                    )
                received = stop.received()
                if step % logging.log_every == 0 or step == last:
                    figures = meter.read()
                    bar.set_postfix_str(_shown(loss, figures))
                    self._log.write(
                        step=step,
                        loss=loss,
                        grad_norm=grad_norm,
                        learning_rate=float(self._rates(step - 1)),
                        tokens=step * taken.tokens.size,
                        **figures,
                    )
                if step == last or (logging.eval_every and step % logging.eval_every == 0):
                    with meter.paused():
                        self._evaluate(step, state)
                if received or step == last or step % logging.save_every == 0:
                    checkpoints.save(step, state, begins)
                    saved = step
                    self._log.plot()
                if received:
                    break
        return step, state

    def _evaluate(self, step: int, state: TrainState) -> None:
        if self._held_out:
            losses = losses_by_length(self._trainer, state.params, self._held_out)
            self._log.write(step=step, eval_losses={str(n): loss for n, loss in losses.items()})

    def _path(self, name: str) -> str:
        return os.path.join(self._settings.output_dir, name)


def _shown(loss: float, figures: dict[str, Any]) -> str:
    parts = [f"loss {loss:.4f}"]
    if figures["tokens_per_second"]:
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if figures["mfu"]:
        parts.append(f"MFU {figures['mfu']:.1%}")
    parts.append(f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB")
    return ", ".join(parts)


def _open_folder(settings: TrainingConfig) -> str:
    """Creates the run's folder, or checks that the run in it is this one; returns the folder.

    Raises:
      UserError: the folder holds something else, or a run with other settings, which are named.
    """
    folder, wanted = settings.output_dir, json.loads(json.dumps(settings.resume_fingerprint()))
    file = os.path.join(folder, "settings.json")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(file):
            if os.listdir(folder):
                raise UserError(f"{folder} holds other files; name a new folder, or an empty one.")
            write_atomically(file, json.dumps(wanted, indent=1) + "\n")
            return folder
        with open(file, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as error:
        raise UserError(f"{folder} cannot be used: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}.") from None
    names = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
    if names:
        shown = "; ".join(f"{n} was {_short(found.get(n))}" for n in names)
        raise UserError(
            f"{folder} holds a run with other settings ({shown}); give the same ones to resume it, "
            "or name a new folder."
        )
    return folder


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
