"""Evaluation: every model scored per example on the same held-out pairs, intervals, and a verdict with its rules.

``job`` describes the work and starts it, ``__main__`` is the child that loads models. ``metrics`` and ``gate`` turn
stored scores into figures and a decision without any model, so that anyone can recompute them; ``statistics`` has the
intervals.
"""
