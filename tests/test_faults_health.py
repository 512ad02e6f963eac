"""Training that falls ill stops within the step, says why, and leaves nothing that could be taken for a result."""

import functools
import json
from pathlib import Path
from typing import Any

import faulty
import pytest
from test_faults_checkpoints import Place, at, points, sft  # noqa: F401 (fixtures)

from preference_tuning import jobs
from preference_tuning.errors import DivergedError
from preference_tuning.training import job


def in_loss(step: int, factor: float) -> None:
    """Multiply the loss of an optimizer step, and of all steps after it, by a factor."""
    from preference_tuning.training import trainers

    plain = trainers.AnswerSFTTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        return loss * factor if self.model.training and self.state.global_step >= step - 1 else loss

    trainers.AnswerSFTTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def in_evaluation() -> None:
    from preference_tuning.training import trainers

    plain = trainers.AnswerSFTTrainer.prediction_step

    def prediction_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, *others = plain(self, *args, **kwargs)
        return (loss * float("nan"), *others)

    trainers.AnswerSFTTrainer.prediction_step = prediction_step  # type: ignore[method-assign]


def in_gradient(step: int) -> None:
    """Let one gradient be infinite before an update."""
    import transformers

    plain = transformers.Trainer._clip_grad_norm

    def clip(self: Any, model: Any) -> Any:
        if self.state.global_step == step - 1:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return plain(self, model)

    transformers.Trainer._clip_grad_norm = clip


def in_weight(step: int, value: float) -> None:
    """Let one weight be ``value`` after an update whose loss and gradient were healthy."""
    import torch

    plain, done = torch.optim.AdamW.step, 0

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        found = plain(self, *args, **kwargs)
        done += 1
        if done == step:
            self.param_groups[0]["params"][3].data.view(-1)[5] = value
        return found

    torch.optim.AdamW.step = update


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "step", "message"),
    [
        (functools.partial(in_loss, 5, float("nan")), 5, "loss is nan"),
        (functools.partial(in_loss, 2, float("inf")), 2, "loss is inf"),
        (functools.partial(in_gradient, 4), 4, "grad_norm is "),
        (functools.partial(in_weight, 7, float("nan")), 7, "a trained weight reaches nan"),
        (functools.partial(in_weight, 5, 2e5), 5, "a trained weight reaches 2e+05 (healthy: below 10000)"),
        (functools.partial(in_loss, 2, 0.0), 11, "the gradient has been exactly 0 for 10 steps"),
        (in_evaluation, 6, "eval_loss is nan"),
    ],
    ids=["nan loss", "infinite loss", "gradient", "nan weight", "huge weight", "zero gradient", "evaluation"],
)
def test_illness_stops_the_step(at: Place, tmp_path: Path, fault: faulty.Fault, step: int, message: str) -> None:  # noqa: F811
    folder = faulty.place(at.job("sft"), tmp_path / "sft")
    assert faulty.run(folder, fault) == DivergedError.exit_code == 4
    told = json.loads((folder / jobs.ERROR).read_text(encoding="utf-8"))["message"]
    assert told.startswith(f"step {step}: {message}")
    good = (step - 1) // 3 * 3
    assert (f"the last good checkpoint is {folder / 'checkpoints'}/checkpoint-{good}" in told) == (good > 0)
    assert "learning_rate 0.003" in told
    assert "\n" not in told
    assert not (folder / jobs.RESULT).exists()
    assert not (folder / job.ADAPTER).exists()
    assert sorted(path.name for path in folder.glob("checkpoints/checkpoint-*")) == [
        f"checkpoint-{saved}" for saved in range(3, step, 3) if saved > good - 6
    ], "nothing of the ill step is kept"
    losses = [p.step for p in points(folder) if "sft/train/loss" in p.metrics]
    assert losses in ([*range(1, step)], [*range(1, step + 1)])


@pytest.mark.faults
def test_a_streak_is_not_forgotten_by_an_interruption(at: Place, tmp_path: Path) -> None:  # noqa: F811
    dead = functools.partial(in_loss, 2, 0.0)
    folder = faulty.place(at.job("sft"), tmp_path / "sft")
    both = functools.partial(faulty.both, dead, functools.partial(faulty.kill_at_step, 8))
    assert faulty.run(folder, both) == faulty.KILLED
    assert faulty.run(folder, dead) == 4
    assert "step 11" in json.loads((folder / jobs.ERROR).read_text(encoding="utf-8"))["message"]
