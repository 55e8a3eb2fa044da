"""TRL's inputs as cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.specs.shared.spec_case import CaseKind, SpecCase
from sdpo_conformance.specs.trl.bounds import trl_errors
from sdpo_conformance.specs.trl.corners import TRLCorner, draw
from sdpo_conformance.specs.trl.loss_input import TRLLossInput, TRLTraining
from sdpo_conformance.specs.trl.oracle import trl_loss
from sdpo_conformance.specs.trl.pipeline import PIPELINE

KIND = CaseKind(
    spec="trl",
    input=TRLLossInput,
    training=TRLTraining,
    mask="completion_mask",
    rows="self_distillation_mask",
    ids="completion_ids",
    oracle=trl_loss,
    errors=trl_errors,
    plain=PIPELINE.natively(),
)


def build(source: Source, corner: TRLCorner, dtypes: Sequence[torch.dtype]) -> SpecCase:
    """A case within ``corner``, in one of ``dtypes``."""
    loss_input = draw(source, corner, dtypes)
    layout, incoming = source.pick(corner.layout), source.pick(corner.incoming)
    case = SpecCase(loss_input, KIND, layout, incoming)
    return case.with_rows_alike() if layout == "expanded" else case
