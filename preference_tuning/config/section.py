"""What all sections of a run config have in common."""

import re
from typing import Annotated, Any, Final, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Share = Annotated[float, Field(gt=0, lt=1)]

UNSHOWN: Final = "unshown"
"""The type of an error whose message must not show the value, because it may be a key."""


PORTABLE: Final = {"portable": True}
"""The context of a dump whose places (``config.place``) tell nothing of this machine."""


def _a_name_and_no_key(value: Any) -> Any:
    # Keys have small letters, names of variables by custom have none.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
        raise PydanticCustomError(
            UNSHOWN, "must be the name of an environment variable, in capitals, and not the key itself"
        )
    return value


VariableName = Annotated[str, BeforeValidator(_a_name_and_no_key)]


class Secret(NamedTuple):
    """A ZenML secret that a setting names, and where its value goes."""

    field: str
    """The setting."""
    name: str
    value: str
    """Which of the secret's values."""
    variable: str
    """The environment variable that takes it."""


class Section(BaseModel):
    """A part of the run config: unknown keys are errors, values are fixed once read, nan and inf are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # pydantic would take `beta: true` as 1.0, and `load_in_4bit: "no"` as False.
        annotation = str(cls.model_fields[info.field_name].annotation)
        wants_bool = "bool" in annotation
        if isinstance(value, bool) and not wants_bool:
            raise ValueError("true and false are not accepted here")
        if wants_bool and not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value

    def portable(self) -> Self:
        """Return the section as it is hashed and published: every place without what is of this machine only."""
        return self.model_validate(self.model_dump(exclude_unset=True, context=PORTABLE))


def to_of(value: Any) -> Any:
    """Return the ``to`` of an entry, which says what kind it is.

    Unions are told apart by this function, and not by the field: pydantic takes none that has a validator before it, as
    the fields of all sections have.
    """
    return value.get("to") if isinstance(value, dict) else getattr(value, "to", None)
