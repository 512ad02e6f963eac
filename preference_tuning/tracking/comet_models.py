"""Comet's model registry: the files of a version on the run's experiment, and a registered model that points to them.

A registered version is known by the tag that is our id, so that it is found again whatever happened since. ``look``
asks whether it is there and corrects what follows the champion; ``send`` uploads it. Both are done by a child.
"""

import re
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning.errors import PreferenceTuningError, TransientError
from preference_tuning.tracking import comet_child
from preference_tuning.tracking.comet import private_settings

LOOK_SECONDS = 10.0
SEND_SECONDS, BYTES_PER_SECOND = 60.0, 1_000_000
CHAMPION, CANDIDATE = "champion", "candidate"
STATUSES = {True: ("Production",), False: ("Staging", "Development"), None: ("Archived", "None")}
"""What a workspace may call the champion, a candidate, and a champion of the past; each has its own list."""
ATTEMPTS = 3


class Model(BaseModel):
    """A version on its way into Comet's registry."""

    do: Literal["look", "send"] = "look"
    name: str
    """Of the registered model; see ``proper_name``."""
    version: str
    """Our id."""
    champion: bool
    experiment: str
    workspace: str | None
    project: str | None
    tags: list[str]
    comment: str
    files: dict[str, Path]
    """Where each file lies, by its name in the version."""

    @property
    def model(self) -> str:
        """The name of the files on the experiment."""
        return f"{self.name}-{self.version}"

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(path.stat().st_size for path in self.files.values())


class Registered(BaseModel):
    """Where a version is in Comet's registry; its number is None as long as it is not there."""

    workspace: str
    number: str | None
    status: str = "not set"


def look(model: Model) -> Registered:
    """Return where a version is, with the tags and the status of the champion as they should be.

    Raises:
        ConfigError: no key, or a wrong one.
        TransientError: Comet cannot be reached within ``LOOK_SECONDS``.
        PreferenceTuningError: Comet refuses.
    """
    asked = model.model_copy(update={"do": "look"})
    return comet_child.ask(__name__, asked, Registered, LOOK_SECONDS)


def send(model: Model) -> Registered:
    """Upload what is missing of a version's files, register it, and return where it is then.

    Raises: as ``look``; the deadline is that of 1 MB a second.
    """
    asked = model.model_copy(update={"do": "send"})
    return comet_child.ask(__name__, asked, Registered, SEND_SECONDS + model.size / BYTES_PER_SECOND)


def proper_name(name: str) -> str:
    """Return what Comet makes of the name of a registered model: small letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _answer(text: str) -> Registered:
    import comet_ml

    model = Model.model_validate_json(text)
    api = comet_ml.API(cache=False)
    workspace = model.workspace or api.get_account_details()["defaultWorkspaceName"]
    number = _number(api, workspace, model)
    if number is None:
        if model.do == "look":
            return Registered(workspace=workspace, number=None)
        _upload(comet_ml, api, workspace, model)
        number = _register(comet_ml, api, workspace, model)
    status = _follow(api, workspace, model, number)
    return Registered(workspace=workspace, number=number, status=status)


def _numbers(api: Any, workspace: str, model: Model, tag: str | None = None) -> list[str]:
    """Return the numbers of the registered versions, of those with a tag if one is given; the oldest first."""
    if model.name not in api.get_registry_model_names(workspace):
        return []
    found = api.get_model(workspace, model.name).find_versions(tag=tag)
    return sorted(found, key=lambda number: [int(part) for part in re.findall(r"\d+", number)])


def _number(api: Any, workspace: str, model: Model) -> str | None:
    return next(iter(_numbers(api, workspace, model, model.version)), None)


def _upload(comet_ml: Any, api: Any, workspace: str, model: Model) -> None:
    """Put the files that are not there yet on the run's experiment, and see that they arrived.

    Raises:
        TransientError: Comet did not take them.
    """
    missing = _missing(api, model)
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        experiment = comet_ml.start(
            online=True,
            workspace=workspace,
            project_name=model.project,
            experiment_key=model.experiment,
            mode="get_or_create",
            experiment_config=private_settings(Path(folder), []),
        )
        if not experiment.alive:
            raise TransientError("Comet does not open the experiment")
        # At its end the client would send the name of this machine's user in a message to its owner.
        experiment.send_notification = lambda *_, **__: None
        for name in missing:
            experiment.log_model(model.model, str(model.files[name]), file_name=name)
        experiment.end()
    if lost := _missing(api, model):
        raise TransientError(f"Comet has not got {len(lost)} of {len(model.files)} files, such as {lost[0]}")


def _missing(api: Any, model: Model) -> list[str]:
    """Return the names of files that the experiment lacks, or has in another size."""
    found = api.get_experiment_by_key(model.experiment)
    names = found.get_model_names() if found else []
    assets = found.get_model_asset_list(model.model) if model.model in names else []
    there = {asset["fileName"]: int(asset["fileSize"]) for asset in assets}
    return [name for name, path in model.files.items() if there.get(name) != path.stat().st_size]


def _register(comet_ml: Any, api: Any, workspace: str, model: Model) -> str:
    """Register the uploaded files under the next number and return it; that of another push, if one was first.

    Raises:
        PreferenceTuningError: others took every number that was tried.
    """
    from comet_ml.exceptions import CometRestApiException

    experiment = comet_ml.APIExperiment(api=api, previous_experiment=model.experiment)
    for attempt in range(ATTEMPTS):
        taken = [int(number.split(".")[2]) for number in _numbers(api, workspace, model) if _ours(number)]
        number = f"1.0.{max(taken, default=-1) + 1}"
        try:
            experiment.register_model(
                model.model,
                version=number,
                registry_name=model.name,
                public=False,
                comment=model.comment,
                tags=[*model.tags, CHAMPION if model.champion else CANDIDATE],
            )
        except (CometRestApiException, ValueError):
            # Most often the number was taken in between.
            if number not in _numbers(api, workspace, model) or attempt == ATTEMPTS - 1:
                raise
            continue
        first = _number(api, workspace, model)
        if first is not None and first != number:
            api.delete_registry_model_version(workspace, model.name, number)
        return first or number
    raise PreferenceTuningError("Comet: no number was free")


def _ours(number: str) -> bool:
    return re.fullmatch(r"1\.0\.\d+", number) is not None


def _follow(api: Any, workspace: str, model: Model, number: str) -> str:
    """Bring tags and status to who is the champion, and return the status of the version."""
    registered, allowed = api.get_model(workspace, model.name), _allowed(api, workspace)
    if model.champion:
        for other in _numbers(api, workspace, model, CHAMPION):
            if other != number:
                registered.delete_tag(other, CHAMPION)
                registered.add_tag(other, CANDIDATE)
                _set_status(registered, other, allowed, None)
    role, left = (CHAMPION, CANDIDATE) if model.champion else (CANDIDATE, CHAMPION)
    there = registered.tags(number)
    if left in there:
        registered.delete_tag(number, left)
    if role not in there:
        registered.add_tag(number, role)
    return _set_status(registered, number, allowed, model.champion)


def _allowed(api: Any, workspace: str) -> list[str]:
    return list(api.model_registry_allowed_status_values(workspace))


def _set_status(registered: Any, number: str, allowed: list[str], champion: bool | None) -> str:
    """Set the first status that the workspace has; a workspace that wants a review first keeps its own."""
    from comet_ml.exceptions import CometRestApiException

    wanted = next((status for status in STATUSES[champion] if status in allowed), None)
    now = str(registered.status(number))
    if wanted is None or now == wanted:
        return now
    try:
        registered.set_status(number, wanted)
    except CometRestApiException as error:
        if error.response.status_code not in (400, 403, 409):
            raise
        return f"{now}, as Comet refuses {wanted}"
    return wanted


if __name__ == "__main__":
    comet_child.reply(_answer)
