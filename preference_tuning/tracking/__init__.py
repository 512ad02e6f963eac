"""Tracking: what a run measured and made, kept in a folder of its own, and brought to Comet from there.

Jobs write a spool (``spool``) and know nothing more. The steps note in the run's folder (``folder``) what belongs to
the run, through ``recording``. One function (``delivery``) feeds a tracker from that folder: Comet while the run lives,
Comet later, or Comet's offline archives (``sending``). Only ``comet`` knows comet_ml.
"""
