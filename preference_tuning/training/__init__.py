"""Training: the SFT and DPO jobs, each in its own process, on TRL's trainers with a forward pass of our own.

``job`` describes the work and starts it, ``__main__`` is the child, ``trainers`` hold the two
trainers, ``reference`` proves the DPO reference, ``checkpoints`` and ``callbacks`` keep the work safe and visible.
"""
