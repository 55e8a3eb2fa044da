"""What a run asks of TRL's spec."""

from __future__ import annotations

from sdpo_conformance.specs.shared.parts_of import parts_of
from sdpo_conformance.specs.trl import SPEC
from sdpo_conformance.specs.trl.case import KIND, build
from sdpo_conformance.specs.trl.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.trl.defects import DIALECTS, TEACHERS, catalogue, load

PARTS = parts_of(SPEC, KIND, build, NEUTRAL, EVERYTHING, catalogue, DIALECTS, load, TEACHERS)
