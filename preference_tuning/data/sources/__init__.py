"""Sources of rows: ``origins`` finds and opens them; ``files``, ``json_rows`` and ``tabular`` read."""

from preference_tuning.data.sources.files import Reading
from preference_tuning.data.sources.origins import fingerprint_of, open_source

__all__ = ["Reading", "fingerprint_of", "open_source"]
