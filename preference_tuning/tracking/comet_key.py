"""Whether Comet knows the key in the environment; also the child that asks."""

from pydantic import BaseModel

from preference_tuning.tracking import comet_child

SECONDS = 10.0


class Question(BaseModel):
    """Whose key is it."""


class Account(BaseModel):
    """Whose key it is."""

    user: str
    workspace: str
    """Where experiments go that name no other."""


def account(seconds: float = SECONDS) -> Account:
    """Return whose key is in the environment.

    Raises:
        ConfigError: there is none, or Comet does not know it.
        TransientError: Comet cannot be reached within ``seconds``.
    """
    return comet_child.ask(__name__, Question(), Account, seconds)


def _ask(_: str) -> Account:
    import comet_ml

    found = comet_ml.API(cache=False).get_account_details()
    return Account(user=found["userName"], workspace=found["defaultWorkspaceName"])


if __name__ == "__main__":
    comet_child.reply(_ask)
