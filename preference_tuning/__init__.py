"""Preference tuning of language models: the library behind the pipeline.

Reading order: ``config`` (what a run is), ``data`` (rows in, canonical pairs out), ``models`` (loading, chat
templates, log-probabilities), ``training`` (the SFT and DPO jobs), ``evaluation`` (scores and the verdict),
``registry`` (versions, the champion, pushes), ``tracking`` (the metrics spool and Comet). Around them: ``preflight``
(what is known before a run), ``retraining`` (when to train again, and the history), ``scheduling``, ``notifying``,
and ``commandline`` (what ``run.py`` understands).
Nothing here imports zenml.
"""

__version__ = "0.1.0"
