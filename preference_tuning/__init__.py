"""Preference tuning of language models: the library behind the pipeline.

Reading order: ``config`` (what a run is), ``data`` (rows in, canonical pairs out), ``models`` (loading, chat
templates, log-probabilities), ``training`` (the SFT and DPO jobs), ``evaluation`` (scores and the verdict),
``registry`` (versions and the champion), ``tracking`` (the metrics spool and Comet). Nothing here imports zenml.
"""

__version__ = "0.1.0"
