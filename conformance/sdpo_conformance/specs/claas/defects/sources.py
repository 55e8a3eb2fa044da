"""Where defects were seen: public issues and pull requests, by repository and number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Citation:
    """A public issue or pull request: ``reference`` as owner/repository#number, its ``title`` and ``url``."""

    reference: str
    title: str
    url: str


@cache
def known() -> dict[str, Citation]:
    """Every source by its reference."""
    text = (files("sdpo_conformance.specs.claas.defects") / "sources.json").read_text(encoding="utf-8")
    return {reference: Citation(reference, **entry) for reference, entry in json.loads(text).items()}


def cite(*references: str) -> tuple[Citation, ...]:
    """The citations of these references; raises KeyError for one that sources.json does not have."""
    return tuple(known()[reference] for reference in references)
