"""Metrics: the spool on disk, which is the truth, and Comet, which is fed from it.

A tracker that cannot start stops the run; one that fails later only warns. The only package that knows comet_ml.
"""
