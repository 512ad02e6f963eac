"""The optional section about lm-evaluation-harness, for tasks beside the held-out pairs."""

from typing import Annotated

from pydantic import Field

from preference_tuning.config.place import Place
from preference_tuning.config.section import Section, Text


class HarnessConfig(Section):
    """Tasks of one's own that lm-evaluation-harness runs on every model; needs the extra ``lm-eval``."""

    tasks: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names of tasks, groups or tags in ``include_path``; the harness's own tasks would need the hub."""
    include_path: Place
    """The folder of their YAML files, and best of their data."""
    limit: int | None = Field(None, ge=1)
    """Examples of each task, from its beginning. None: all."""
    num_fewshot: int | None = Field(None, ge=0, le=1000)
    """Worked examples before each question. None: what the task says."""
