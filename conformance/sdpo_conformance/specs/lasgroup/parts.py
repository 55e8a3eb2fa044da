"""What a run asks of lasgroup's spec."""

from __future__ import annotations

from sdpo_conformance.specs.lasgroup import SPEC
from sdpo_conformance.specs.lasgroup.case import KIND, build
from sdpo_conformance.specs.lasgroup.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.lasgroup.defects import DIALECTS, TEACHERS, catalogue, load
from sdpo_conformance.specs.shared.parts_of import parts_of

PARTS = parts_of(SPEC, KIND, build, NEUTRAL, EVERYTHING, catalogue, DIALECTS, load, TEACHERS)
