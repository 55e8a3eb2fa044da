"""What a run asks of verl-topk's spec."""

from __future__ import annotations

from sdpo_conformance.specs.shared.parts_of import parts_of
from sdpo_conformance.specs.verl_topk import SPEC
from sdpo_conformance.specs.verl_topk.case import KIND, build
from sdpo_conformance.specs.verl_topk.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.verl_topk.defects import DIALECTS, catalogue, load

PARTS = parts_of(SPEC, KIND, build, NEUTRAL, EVERYTHING, catalogue, DIALECTS, load)
