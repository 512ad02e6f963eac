"""What runs beside the training loop: when to evaluate and save, the metrics, the watch over its health, signals."""

import itertools
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from preference_tuning.config import StageConfig
from preference_tuning.errors import DivergedError, InterruptedJobError
from preference_tuning.jobs import stopping
from preference_tuning.models import weights
from preference_tuning.progress import bar
from preference_tuning.tracking.spool import Point, Spool
from preference_tuning.training import checkpoints, processes
from preference_tuning.training.schedule import steps_of_share

ZERO_GRADIENTS = 10
"""Optimizer steps with a gradient of exactly zero after which training is declared dead."""

SKIPPED_STEPS = 20
"""Steps in a row that float16's loss scaling may skip: each halves the scale, which begins at 2 ** 16."""

TIMING_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch", "step")


class Shares(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves when given shares of the optimizer steps are done, the last step included.

    transformers rounds ``eval_steps=0.2`` up to whole steps and then misses the end; this evaluates five times.
    """

    def __init__(self, eval_share: float, save_share: float, evaluate: Callable[[], object]) -> None:
        self._eval, self._save, self._evaluate = eval_share, save_share, evaluate

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        # A checkpoint may have been written in place of an evaluation (see Stop).
        if state.global_step in steps_of_share(self._eval, state.max_steps) - evaluated:
            self._evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in steps_of_share(self._eval, state.max_steps):
            control.should_evaluate = True
        if state.global_step in steps_of_share(self._save, state.max_steps):
            control.should_save = True


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Writes every metric to the spool, under ``stage/train/...`` and ``stage/eval/...``."""

    def __init__(self, stage: str, spool: Spool, every: int) -> None:
        self._stage, self._spool, self._every = stage, spool, every

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return  # transformers' own summary, wrong after a resume
        evaluation = {k.removeprefix("eval_"): float(v) for k, v in logs.items() if _is_evaluation(k)}
        training = {k: float(v) for k, v in logs.items() if not k.startswith("eval_") and k not in TIMING_METRICS}
        if evaluation:
            self._send(state, {f"{self._stage}/eval/{k}": v for k, v in evaluation.items()})
        elif training and (state.global_step % self._every == 0 or state.global_step == state.max_steps):
            self._send(state, {f"{self._stage}/train/{k}": v for k, v in training.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._spool.close()

    def _send(self, state: TrainerState, metrics: dict[str, float]) -> None:
        epoch = round(state.epoch, 4) if state.epoch is not None else None
        self._spool.append(Point(step=state.global_step, epoch=epoch, metrics=metrics))


def _is_evaluation(name: str) -> bool:
    return name.startswith("eval_") and name not in TIMING_METRICS


class Health(TrainerCallback):  # type: ignore[misc]
    """Stops training in the step in which its numbers stop being numbers, or when its gradient has died.

    Every step is logged before anything of it is saved, so no checkpoint holds what this refuses. Streaks are read from
    the history that travels in the checkpoints: an interruption does not begin them anew.
    """

    def __init__(self, settings: StageConfig, accelerator: Any) -> None:
        self._settings, self._accelerator = settings, accelerator

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        if reason := self._wrong(logs or {}, state, model):
            good, _rejected = checkpoints.newest_good(Path(str(args.output_dir)))
            kept = f"the last good checkpoint is {good}" if good else "no checkpoint was written before"
            raise DivergedError(f"step {state.global_step}: {reason}. Training is stopped; {kept}")

    def _wrong(self, logs: dict[str, Any], state: TrainerState, model: Any) -> str | None:
        """Return what is wrong with a step and its likely causes, or None."""
        if not math.isfinite(float(logs.get("eval_loss", 0.0))):
            return f"eval_loss is {float(logs['eval_loss'])}, {self._too_fast()}"
        if "grad_norm" not in logs:
            return None
        if self._scaler_skipped(state):
            return None
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs[name])):
                return f"{name} is {float(logs[name])}, {self._too_fast()}"
        if _streak(state, lambda past: past["grad_norm"] == 0.0) >= ZERO_GRADIENTS:
            return (
                f"the gradient has been exactly 0 for {ZERO_GRADIENTS} steps: nothing is learned. Likely causes: "
                f"identical answers, a saturated loss (learning_rate {self._settings.learning_rate:g} or beta too high)"
            )
        largest = weights.largest(model)
        if not largest <= weights.LARGEST:
            return f"a trained weight reaches {largest:.3g} (healthy: below {weights.LARGEST:g}), {self._too_fast()}"
        return None

    def _too_fast(self) -> str:
        settings = self._settings
        return (
            f"training diverged. Likely causes: learning_rate {settings.learning_rate:g} too high, too little warm-up "
            f"(warmup_steps {settings.warmup_steps:g}), max_grad_norm {settings.max_grad_norm:g} too high, damaged rows"
        )

    def _scaler_skipped(self, state: TrainerState) -> bool:
        """Return whether float16's loss scale was too large for this step and is being lowered: no sign of sickness."""
        skipped = self._accelerator.scaler is not None and self._accelerator.optimizer_step_was_skipped
        return skipped and _streak(state, lambda past: not math.isfinite(past["grad_norm"])) < SKIPPED_STEPS


def _streak(state: TrainerState, condition: Callable[[dict[str, float]], bool]) -> int:
    """Return for how many steps up to the last one ``condition`` has held."""
    steps = (past for past in reversed(state.log_history) if "grad_norm" in past)
    return sum(1 for _ in itertools.takewhile(condition, steps))


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar with the step, the loss and, in DPO, the reward accuracy."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar = bar(self._stage.upper(), state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.3f}"}
            if "rewards/accuracies" in logs:
                shown["accuracy"] = f"{float(logs['rewards/accuracies']):.2f}"
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class EvaluationStopped(Exception):  # noqa: N818 - no error: the checkpoint of its step is written next
    """A signal ended an evaluation; a resumed job makes up for it."""


class Stop(TrainerCallback):  # type: ignore[misc]
    """Turns SIGTERM and SIGINT into a checkpoint at the end of the running step, and an end of training.

    An evaluation is broken off. A signal reaches several processes at different steps, or one of them alone: they agree
    on the step to stop at. In the same exchange the first one tells the others that it is time for a checkpoint.
    """

    def __init__(self, stage: str, save_every_minutes: float | None) -> None:
        self._stage = stage.upper()
        self.asked = False
        self._interval = math.inf if save_every_minutes is None else 60 * save_every_minutes
        self._saved = time.monotonic()
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, _number: int, _frame: Any) -> None:
        self.asked = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()
        self._before = {number: signal.signal(number, self._ask) for number in stopping.SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = state.is_world_process_zero and time.monotonic() - self._saved >= self._interval
        asked, due = processes.any_of(self.asked, due)
        if due:
            control.should_save = True
        if asked:
            self._save_and_stop(control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._asked_of_any():
            self._save_and_stop(control)
            raise EvaluationStopped

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()
        if self._asked_of_any():
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signals back.

        Raises:
            InterruptedJobError: one came.
        """
        stopped = self._asked_of_any()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if stopped:
            raise InterruptedJobError(
                f"{self._stage} was stopped at step {state.global_step} of {state.max_steps}, after a checkpoint; the "
                "same command continues it"
            )

    def _asked_of_any(self) -> bool:
        (asked,) = processes.any_of(self.asked)
        return asked

    def _save_and_stop(self, control: TrainerControl) -> None:
        self.asked = True
        control.should_save = True
        control.should_evaluate = False
        control.should_training_stop = True


class Clock:
    """Counts the seconds of training over all legs of an interrupted job, pauses left out."""

    def __init__(self, before: float) -> None:
        """Go on from the seconds of the legs ``before``."""
        self._before = before
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the stage first began."""
        return self._before + time.monotonic() - self._start


def watch(
    trainer: Any,
    stage: str,
    settings: StageConfig,
    spool: Spool | None,
    save_every_minutes: float | None,
) -> None:
    """Add the callbacks to a trainer.

    Args:
        trainer: of the stage.
        stage: sft or dpo.
        settings: of the stage.
        spool: where metrics go; None in all processes but the first, which show and write nothing.
        save_every_minutes: the longest that training goes on without a checkpoint; None for as long as it likes.
    """
    shown = [Metrics(stage, spool, settings.logging_steps), Progress(stage)] if spool else []
    trainer.remove_callback(PrinterCallback)
    # Stop is last: it overrules what Shares wants.
    health, stop = Health(settings, trainer.accelerator), Stop(stage, save_every_minutes)
    shares = Shares(settings.eval_steps, settings.save_steps, trainer.evaluate)
    for callback in (health, *shown, shares, stop):
        trainer.add_callback(callback)
