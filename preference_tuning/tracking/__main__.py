"""The process that delivers: ``python -m preference_tuning.tracking send FOLDER`` or ``archive``."""

import sys

from preference_tuning.tracking import sending

if __name__ == "__main__":
    sending.main(*sys.argv[1:])
