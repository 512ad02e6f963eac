"""What Airflow starts for a step of a scheduled pipeline: `python -m pipelines.airflow_step`, in the project's folder.

ZenML's own entry point moves to /app and runs a copy of the code as it was when the schedule was made; here a step runs
the project as it lies there, so relative paths of the config hold.
"""

import sys
from pathlib import Path

from zenml.entrypoints.base_entrypoint_configuration import ENTRYPOINT_CONFIG_SOURCE_OPTION
from zenml.entrypoints.step_entrypoint_configuration import StepEntrypointConfiguration
from zenml.exceptions import EntityExistsError
from zenml.execution.pipeline.utils import prevent_pipeline_execution
from zenml.utils import source_utils

from pipelines.telling import told
from preference_tuning.errors import PreferenceTuningError


class InProject(StepEntrypointConfiguration):
    """Runs a step where it was started."""

    def prepare_code_environment(self) -> None:
        """Find the project's modules in the current folder, whether or not `zenml init` has marked it."""
        sys.path.insert(0, str(Path.cwd()))
        source_utils.set_custom_source_root(str(Path.cwd()))


def main(arguments: list[str]) -> None:
    """Run the step that ZenML's arguments name; a failure ends with its exit code."""
    at = arguments.index(f"--{ENTRYPOINT_CONFIG_SOURCE_OPTION}")
    with told(last=False), prevent_pipeline_execution():
        try:
            InProject(arguments=arguments[:at] + arguments[at + 2 :]).run()
        except EntityExistsError:
            # ZenML counts attempts itself. Airflow's are for what fails before ZenML knows of the step.
            raise PreferenceTuningError("the step failed at an earlier attempt, whose log says why") from None


if __name__ == "__main__":
    main(sys.argv[1:])
