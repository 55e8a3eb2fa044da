"""Importing a peer, or saying in one line what to install."""

from __future__ import annotations

import importlib
from typing import Any


class NotInstalled(ImportError):
    """The package behind an adapter cannot be imported; the message is one line and says what to do."""


def require(module: str, name: str, install: str) -> Any:
    """The object ``name`` of ``module``; raises ``NotInstalled`` with the reason and the command ``install``.

    A package that is there but lacks a dependency or the name reads the same to its user: another package of
    that name, or another version, is not the one that is wanted.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise NotInstalled(f"not installed: {module} ({reason}): {install}") from error
