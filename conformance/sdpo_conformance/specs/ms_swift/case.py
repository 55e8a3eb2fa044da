"""ms-swift's inputs as cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.specs.ms_swift.bounds import ms_swift_errors
from sdpo_conformance.specs.ms_swift.corners import MsSwiftCorner, draw
from sdpo_conformance.specs.ms_swift.loss_input import MsSwiftLossInput, MsSwiftTraining
from sdpo_conformance.specs.ms_swift.oracle import ms_swift_loss
from sdpo_conformance.specs.ms_swift.pipeline import PIPELINE
from sdpo_conformance.specs.shared.spec_case import CaseKind, SpecCase

KIND = CaseKind(
    spec="ms-swift",
    input=MsSwiftLossInput,
    training=MsSwiftTraining,
    mask="labels",
    rows="",
    ids="labels",
    oracle=ms_swift_loss,
    errors=ms_swift_errors,
    plain=PIPELINE.natively(),
)


def build(source: Source, corner: MsSwiftCorner, dtypes: Sequence[torch.dtype]) -> SpecCase:
    """A case within ``corner``, in one of ``dtypes``."""
    loss_input = draw(source, corner, dtypes)
    layout, incoming = source.pick(corner.layout), source.pick(corner.incoming)
    case = SpecCase(loss_input, KIND, layout, incoming)
    return case.with_rows_alike() if layout == "expanded" and corner.prompt == ("same",) else case
