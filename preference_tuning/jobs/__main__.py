"""The process that jobs are forked from, and each of them: ``python -m preference_tuning.jobs``."""

import runpy
import sys

from preference_tuning.jobs import forking

if __name__ == "__main__" and (request := forking.serve()):
    sys.argv = [request.module, request.folder]
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)
