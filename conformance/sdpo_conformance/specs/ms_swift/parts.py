"""What a run asks of ms-swift's spec."""

from __future__ import annotations

from sdpo_conformance.specs.ms_swift import SPEC
from sdpo_conformance.specs.ms_swift.case import KIND, build
from sdpo_conformance.specs.ms_swift.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.ms_swift.defects import DIALECTS, catalogue, load
from sdpo_conformance.specs.shared.parts_of import parts_of

PARTS = parts_of(SPEC, KIND, build, NEUTRAL, EVERYTHING, catalogue, DIALECTS, load)
