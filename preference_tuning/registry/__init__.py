"""The registry: every result is a version, and only a version with evidence becomes champion."""
