"""The section about evaluation: how models are scored on the held-out pairs, and the rules of the verdict."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from preference_tuning.config.harness import HarnessConfig
from preference_tuning.config.judge import JudgeConfig
from preference_tuning.config.place import Place
from preference_tuning.config.section import Section

Primary = Literal[
    "auto", "rewards/accuracies", "likelihood/accuracy", "likelihood/accuracy_norm", "nll/chosen", "judge/win_rate"
]


class GateConfig(Section):
    """The rules of the verdict. The parent of a DPO model is its SFT policy, that of an SFT model the base model."""

    primary: Primary = "auto"
    """What must be better. auto: the reward accuracy of DPO against SFT; the loss on chosen answers where the parent is
    the base model."""
    margin: float = Field(0.0, ge=0, lt=1)
    """By how much the lower end of the interval must be better than the parent, in units of the primary metric."""
    champion_margin: float = Field(0.0, ge=0, lt=1)
    """By how much the lower end must be better than the champion; an equal model is never promoted."""
    min_prompts: int = Field(30, ge=2)
    """Fewer held-out prompts than this leave the verdict inconclusive."""
    wanted_difference: float = Field(0.1, gt=0)
    """The report says how many prompts find a difference of this size in 80 % of trials."""
    max_nll_increase: float = Field(0.2, ge=0)
    """Nats a token: the upper end of the interval of the chosen answers' NLL increase must not exceed this."""
    max_kl: float = Field(0.5, gt=0)
    """Nats a token: the upper end of the divergence of DPO from SFT on chosen answers must not exceed this."""
    max_repetition_increase: float = Field(0.05, ge=0, le=1)
    """By how much the share of repeated 4-grams in generated answers may rise."""
    max_empty_increase: float = Field(0.02, ge=0, le=1)
    """By how much the share of empty answers may rise."""
    length_ratio: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]] = (0.5, 2.0)
    """Between which ratios the mean length of generated answers may lie, against the parent."""
    min_win_rate: float = Field(0.4, ge=0, lt=1)
    """The lower end of the judge's win rate against the parent must lie above this, where there is a judge."""


class EvaluationConfig(Section):
    """Scoring on the held-out pairs, answers to held-out prompts, and the gate."""

    batch_size: int = Field(8, ge=1)
    samples: int = Field(8, ge=0, le=64)
    """Held-out prompts answered by every model, side by side."""
    max_new_tokens: int = Field(96, ge=1, le=4096)
    seed: int = Field(42, ge=0)
    """Of the bootstrap's resamples, and of the sampled answers."""
    general: Place | None = None
    """A .txt or .jsonl file of general text, whose loss shows what a model forgets; see docs/evaluation.md."""
    gate: GateConfig = GateConfig()
    judge: JudgeConfig | None = None
    """None: no judge is asked, and no win rate is shown."""
    lm_eval: HarnessConfig | None = None

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield ``(path of the field, message)`` for settings that are fine alone and wrong together."""
        if self.gate.primary == "judge/win_rate" and self.judge is None:
            yield ("evaluation", "gate", "primary"), "judge/win_rate needs a judge; give evaluation.judge, or use auto"
