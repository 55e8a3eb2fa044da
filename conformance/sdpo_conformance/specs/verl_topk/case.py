"""verl's inputs as cases."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpo_conformance.inputs.choices import Source
from sdpo_conformance.specs.shared.spec_case import CaseKind, SpecCase
from sdpo_conformance.specs.verl_topk.bounds import verl_topk_errors
from sdpo_conformance.specs.verl_topk.corners import VerlTopKCorner, draw
from sdpo_conformance.specs.verl_topk.loss_input import VerlTopKLossInput, VerlTopKTraining
from sdpo_conformance.specs.verl_topk.oracle import verl_topk_loss
from sdpo_conformance.specs.verl_topk.pipeline import PIPELINE

KIND = CaseKind(
    spec="verl-topk",
    input=VerlTopKLossInput,
    training=VerlTopKTraining,
    mask="response_mask",
    rows="",
    ids="response_mask",
    oracle=verl_topk_loss,
    errors=verl_topk_errors,
    plain=PIPELINE.natively(),
)


def build(source: Source, corner: VerlTopKCorner, dtypes: Sequence[torch.dtype]) -> SpecCase:
    """A case within ``corner``, in one of ``dtypes``."""
    loss_input = draw(source, corner, dtypes)
    layout, incoming = source.pick(corner.layout), source.pick(corner.incoming)
    case = SpecCase(loss_input, KIND, layout, incoming)
    return case.with_rows_alike() if layout == "expanded" else case
