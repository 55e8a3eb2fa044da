"""Ways to get the step loop wrong."""

from __future__ import annotations

from sdpo_conformance.defects.model import Defect

DEFECTS: tuple[Defect, ...] = ()
