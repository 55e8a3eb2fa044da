"""lasgroup's inputs as cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.specs.lasgroup.bounds import lasgroup_errors
from sdpo_conformance.specs.lasgroup.corners import LasgroupCorner, draw
from sdpo_conformance.specs.lasgroup.loss_input import LasgroupLossInput, LasgroupTraining
from sdpo_conformance.specs.lasgroup.oracle import lasgroup_loss
from sdpo_conformance.specs.lasgroup.pipeline import PIPELINE
from sdpo_conformance.specs.shared.spec_case import CaseKind, SpecCase

KIND = CaseKind(
    spec="lasgroup",
    input=LasgroupLossInput,
    training=LasgroupTraining,
    mask="response_mask",
    rows="self_distillation_mask",
    ids="response_ids",
    oracle=lasgroup_loss,
    errors=lasgroup_errors,
    plain=PIPELINE.natively(),
)


def build(source: Source, corner: LasgroupCorner, dtypes: Sequence[torch.dtype]) -> SpecCase:
    """A case within ``corner``, in one of ``dtypes``."""
    loss_input = draw(source, corner, dtypes)
    layout, incoming = source.pick(corner.layout), source.pick(corner.incoming)
    case = SpecCase(loss_input, KIND, layout, incoming)
    return case.with_rows_alike() if layout == "expanded" else case
