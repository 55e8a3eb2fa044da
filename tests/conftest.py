"""What every test of the project shares."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same-each-time", derandomize=True)
settings.register_profile("explore")
settings.load_profile("same-each-time")
"""A test says something of the change at hand, not of the day; ``--hypothesis-profile=explore`` looks further."""
