"""Models: where they lie, how they are loaded, how text becomes tokens, and what log-probability they give an answer.

The only package that knows peft, bitsandbytes and unsloth.
"""
