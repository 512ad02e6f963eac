"""Preference data: rows of a source in, one canonical table out, checked, without duplicates, split by prompt."""
