"""The section about notifications: who is told what became of a run."""

from typing import Annotated, Final, Literal

from pydantic import Discriminator, Field, Tag

from preference_tuning.config.place import Place
from preference_tuning.config.section import Section, VariableName, to_of

UNKNOWN_RECEIVER: Final = "unknown_receiver"
"""The type of the error of a receiver that there is none of."""
Event = Literal["promoted", "held", "failed"]


class NotifyConfig(Section):
    """What all receivers have in common."""

    on: Annotated[tuple[Event, ...], Field(min_length=1)] = ("promoted", "held", "failed")
    """After which ends of a run. A run that was interrupted, and a start that found nothing to do, tell nobody."""


class WebhookNotify(NotifyConfig):
    """An address that takes a POST. It is a secret, so only the variable that holds it is named."""

    to: Literal["webhook"]
    url_env: VariableName
    """Environment variable with the address."""
    format: Literal["json", "slack", "discord"] = "json"
    """json: every fact by its name; slack, discord: the text, as their incoming webhooks take it."""


class CommandNotify(NotifyConfig):
    """A program: it gets the message as JSON on its standard input, and its main facts in environment variables."""

    to: Literal["command"]
    run: Annotated[tuple[Place, ...], Field(min_length=1)]
    """The program and its arguments; no shell reads them."""


class AlerterNotify(NotifyConfig):
    """The alerter of ZenML's active stack."""

    to: Literal["alerter"]


Receiver = Annotated[
    Annotated[WebhookNotify, Tag("webhook")]
    | Annotated[CommandNotify, Tag("command")]
    | Annotated[AlerterNotify, Tag("alerter")],
    Discriminator(
        to_of,
        custom_error_type=UNKNOWN_RECEIVER,
        custom_error_message="`to` must say who is told: webhook, command or alerter",
    ),
]
