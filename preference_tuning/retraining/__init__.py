"""Scheduled retraining: one start that trains, or says why it does not, and can be made by anything at any time.

``lock`` (never two at once), ``fingerprints`` (what a run is made of), ``decision`` (train or skip), ``history`` (what
became of every run), ``attempt`` (all of it in its order), ``shown`` (for people and machines).
"""
