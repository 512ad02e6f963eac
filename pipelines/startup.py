"""What ZenML does at the start of every run that nobody needs here, and that costs seconds of every command.

Importing this module switches it off in this process. docs/decisions.md says why that is safe.
"""

import email
import functools
import importlib.metadata

from zenml.environment import Environment
from zenml.integrations.pandas import PandasIntegration
from zenml.integrations.pytorch import PytorchIntegration
from zenml.integrations.scipy import ScipyIntegration


class _OnDemand:
    """An integration that takes the place of ZenML's own of the same name, as its registry offers, when it is defined.

    Activated, ZenML's would import its library, to register materializers of its types. Our steps hand on directories.
    """

    @classmethod
    def activate(cls) -> None:
        """Register nothing."""


class PandasOnDemand(_OnDemand, PandasIntegration):
    """Nothing in the pipeline's process needs pandas."""


class PytorchOnDemand(_OnDemand, PytorchIntegration):
    """Torch belongs to the jobs."""


class ScipyOnDemand(_OnDemand, ScipyIntegration):
    """Nor scipy."""


@functools.cache
def packages() -> list[str]:
    """Return what is installed, as ZenML stores it with each run: ``name==version``.

    ZenML asks `pip freeze`, twice a run, where there is no `uv`: a second and more.
    """
    found = {}
    for package in importlib.metadata.distributions():
        # Of what is told of a package, its long description is most, and is not looked at.
        head = (package.read_text("METADATA") or package.read_text("PKG-INFO") or "").partition("\n\n")[0]
        told = email.message_from_string(head)
        found[told["Name"]] = told["Version"]
    return [f"{name}=={found[name]}" for name in sorted(filter(None, found), key=str.lower)]


Environment.get_python_packages = staticmethod(packages)  # type: ignore[method-assign]
