"""A run of training, from wherever it was left to its last step.

A run's folder holds settings.json (what the weights depend on), checkpoints, log.jsonl, loss.png
and, at the end, the trained model as a Hugging Face folder.
"""

import json
import math
import os
import shutil
from typing import Any

from lsjax.checkpoint import checkpoint_bytes, export_parameters, load_parameters
from lsjax.errors import UserError
from lsjax.files import write_atomically
from lsjax.hosts import from_the_first
from lsjax.nn.parameters import random_parameters
from lsjax.progress import byte_bar, step_bar
from lsjax.training.checkpoints import Checkpoints
from lsjax.training.documents import open_corpus
from lsjax.training.evaluation import HeldOut, hold_out, losses_by_length
from lsjax.training.log import Log
from lsjax.training.meter import Meter
from lsjax.training.optimiser import learning_rates, optimiser
from lsjax.training.packing import Packer, Place
from lsjax.training.settings import Settings
from lsjax.training.step import Trainer, TrainState
from lsjax.training.stopping import Stop

MODEL = "model"  # the folder of the trained model


def train(settings: Settings) -> int:
    """Trains until the last step is taken and the model written, or a signal asks to stop.

    Returns:
      The signal that asked, once everything is saved; 0 where the run is complete.

    Raises:
      UserError: the data are wrong, the folder holds another run, or the loss is not finite.
    """
    return _Run(settings)()


class _Run:
    def __init__(self, settings: Settings):
        s = self._settings = settings
        vocabulary = s.origin.vocabulary()
        self._packer = Packer(
            open_corpus(s.rows.data, vocabulary), s.rows.length, s.rows.seed, s.rows.span
        )
        self._held_out: HeldOut = {}
        if s.watch.eval_data:
            corpus = open_corpus(s.watch.eval_data, vocabulary)
            self._held_out = hold_out(corpus, s.watch.eval_lengths, s.rows.rows)
        from_the_first(lambda: _open_folder(s))
        self._trainer = Trainer(s.origin.config, s.mesh, optimiser(s.optimisation), s.dtype)
        self._rates = learning_rates(s.optimisation)

    def __call__(self) -> int:
        s = self._settings
        with Stop() as stop, Checkpoints(self._path("checkpoints"), s.watch.keep) as checkpoints:
            step, state, place = self._begin(checkpoints)
            if step < s.optimisation.steps:
                from_the_first(self._drop_model)
            self._log = Log(s.output_dir, step)
            step, state = self._steps(step, state, place, stop, checkpoints)
            if asked := stop.asked() if step < s.optimisation.steps else 0:
                return asked
        if not os.path.exists(self._path(MODEL)):
            origin = s.origin
            export_parameters(state.params, origin.hf_config, origin.carried, self._path(MODEL))
        return 0

    def _drop_model(self) -> str:
        """Removes the model of fewer steps, which a run that is made longer has."""
        shutil.rmtree(self._path(MODEL), ignore_errors=True)
        return MODEL

    def _begin(self, checkpoints: Checkpoints) -> tuple[int, TrainState, Place]:
        """The last checkpoint, or the model that the run starts from."""
        s, origin, step = self._settings, self._settings.origin, checkpoints.latest()
        if step is not None:
            return step, *checkpoints.restore(step, self._trainer.shapes())
        if origin.weights is None:
            params = random_parameters(origin.config, s.mesh, "float32", s.rows.seed)
        else:
            with byte_bar("load", checkpoint_bytes(origin.weights)) as bar:
                params = load_parameters(
                    origin.weights, origin.config, s.mesh, "float32", bar.update
                )
        return 0, self._trainer.init(params), Place()

    def _steps(
        self, step: int, state: TrainState, place: Place, stop: Stop, checkpoints: Checkpoints
    ) -> tuple[int, TrainState]:
        s, watch, last = self._settings, self._settings.watch, self._settings.optimisation.steps
        shape = s.rows.accumulate, s.rows.rows
        tables = self._trainer.tables(s.rows.span)
        meter = Meter(s.origin.config, s.mesh.size)
        saved = step
        if step < last:
            batch, place = self._packer.take(place, *shape)
            if step == 0:
                self._evaluate(0, state)
        with step_bar(last, step) as bar:
            while step < last:
                state, metrics = self._trainer.step(state, batch, tables)
                taken, begins = batch, place
                batch, place = self._packer.take(place, *shape)  # while the devices work
                loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
                meter.step(taken)
                step += 1
                bar.update()
                if not math.isfinite(loss + grad_norm):
                    raise UserError(
                        f"the loss of step {step} is {loss} and the norm of its gradients "
                        f"{grad_norm}; what is saved is of step {saved}. Start a new run with a "
                        "lower learning_rate."
                    )
                asked = stop.asked()
                if step % watch.log_every == 0 or step == last:
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
                if step == last or (watch.eval_every and step % watch.eval_every == 0):
                    with meter.paused():
                        self._evaluate(step, state)
                if asked or step == last or step % watch.save_every == 0:
                    checkpoints.save(step, state, begins)
                    saved = step
                    self._log.plot()
                if asked:
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


def _open_folder(settings: Settings) -> str:
    """Makes the run's folder, or sees that the run in it is this one.

    Raises:
      UserError: the folder holds something else, or a run of other settings, which are named.
    """
    folder, wanted = settings.output_dir, json.loads(json.dumps(settings.decisive()))
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
            f"{folder} holds a run of other settings ({shown}); give the same ones to go on with "
            "it, or name a new folder."
        )
    return folder


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
