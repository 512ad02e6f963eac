"""Notifications: what became of a run, told to a webhook or a program; a notification that fails changes nothing.

``message`` (what is told), ``receivers`` (who takes it), ``sending`` (in a bounded time, failures as warnings).
"""
