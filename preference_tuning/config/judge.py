"""The optional section about a judge: a language model that compares answers, asked over an OpenAI-compatible API."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from preference_tuning.config.section import UNSHOWN, Secret, Section, Text, VariableName


class JudgeConfig(Section):
    """Which judge is asked, how often, and what it may cost. Its key is never part of a config."""

    url: Text
    """Where the API begins, such as ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``."""
    model: Text
    """Its name at that place. Not a model of the family that is tuned: judges prefer their own style."""
    api_key_env: VariableName = "OPENAI_API_KEY"
    """The environment variable that holds the key; a server of one's own may need none."""
    api_key_secret: Text | None = None
    """A ZenML secret whose value ``api_key`` is the key, in place of the variable's."""
    prompts: int = Field(200, ge=1, le=100_000)
    """Held-out prompts whose answers are compared, twice each."""
    calibration_pairs: int = Field(100, ge=10, le=100_000)
    """Labelled held-out pairs on which the judge itself is judged; no better than chance, and its rule is off."""
    requests_per_minute: float = Field(60, gt=0, le=1_000_000)
    concurrency: int = Field(4, ge=1, le=256)
    """Requests on their way at a time."""
    timeout: float = Field(60, gt=0, le=3600)
    """Seconds of silence after which a request has failed."""
    max_retries: int = Field(5, ge=0, le=20)
    """How often a request that failed is sent again before the evaluation stops."""
    max_tokens: int = Field(64, ge=8, le=100_000)
    """Of a reply; a judge that thinks aloud needs more."""
    max_total_tokens: int | None = Field(None, ge=1)
    """Most tokens, read and written, that an evaluation may spend on the judge; then it stops."""

    @model_validator(mode="before")
    @classmethod
    def _no_key(cls, values: Any) -> Any:
        if isinstance(values, dict) and "api_key" in values:
            raise PydanticCustomError(
                UNSHOWN, "a key does not belong into a file; api_key_env names the environment variable that holds it"
            )
        return values

    @field_validator("url", mode="before")
    @classmethod
    def _address(cls, value: Any) -> Any:
        parts = urlsplit(value) if isinstance(value, str) else None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise PydanticCustomError(UNSHOWN, "must be an address such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise PydanticCustomError(UNSHOWN, "must be an address alone, without a user, a key or a query in it")
        return value

    def secrets(self) -> list[Secret]:
        """Return the ZenML secret that is the key, if one is."""
        named = self.api_key_secret
        return [Secret("evaluation.judge.api_key_secret", named, "api_key", self.api_key_env)] if named else []
