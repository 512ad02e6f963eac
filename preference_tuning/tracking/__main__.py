"""The process that delivers: ``python -m preference_tuning.tracking send|archive FOLDER``."""

import sys
from pathlib import Path

from preference_tuning.tracking import sending

if __name__ == "__main__":
    sending.main(sys.argv[1], Path(sys.argv[2]))
