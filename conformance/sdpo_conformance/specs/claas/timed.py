"""What the bench asks of the CLaaS spec: is a timed answer right, and does what is timed compute the spec."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability, FusedSDPOLossInput, SDPOLossInput
from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.loss_case import SHARED_FIELDS, LossCase, recorded_cases
from sdpo_conformance.specs.claas.oracle import LossTruth, sdpo_loss
from sdpo_conformance.specs.claas.oracle.eager import EagerLoss, eager_loss
from sdpo_conformance.specs.claas.step_loop.findings import findings
from sdpo_conformance.specs.spec import Timed, TokensTruth
from sdpo_conformance.trainer.observation import Observation


def truth_of_tokens(logits: Tensor, loss_input: FusedSDPOLossInput, on_policy: bool) -> TokensTruth:
    """``logits`` (1, S, V) float64: the exact product of the input's hidden states and head. ``on_policy``: the old
    log-probs are the student's own, so that the ratio is 1 and the loss the mean divergence."""
    shared = {name: getattr(loss_input, name) for name in SHARED_FIELDS}
    if on_policy:
        chosen = logits.log_softmax(-1).gather(-1, loss_input.response_ids.cpu().unsqueeze(-1)).squeeze(-1)
        shared["old_student_logprobs"] = chosen.to(loss_input.old_student_logprobs)
    truth = sdpo_loss(SDPOLossInput(student_logits=logits, training=loss_input.training, **shared))
    eager = eager_loss(replace(loss_input, **shared))
    terms = truth.weight * (truth.ratio * truth.per_token.abs() + loss_input.training.kl_reg_weight * truth.k3)
    scale = max(float(terms.sum()), 1e-300)
    return TokensTruth(
        loss=float(truth.loss),
        gradient=truth.grad_logits,
        scale=scale,
        eager_loss=float(eager.loss),
        eager_gradient=eager.gradients["student_hidden"],
        eager_error=eager_error(eager, truth) / scale,
    )


def eager_error(eager: EagerLoss, truth: LossTruth) -> float:
    """Plain PyTorch's error of the loss, token by token so that no luck of the signs makes it small."""
    per_token = (truth.weight * truth.ratio * (eager.per_token.cpu() - truth.per_token).abs()).sum()
    whole = (eager.loss.cpu() - truth.loss).abs()
    return float(torch.nan_to_num(per_token + whole, nan=0.0, posinf=0.0))


def recorded_alike(entry: Capability, dtype: torch.dtype) -> list[LossCase]:
    """The recorded cases of the commonest shape (another one would compile kernels anew), those left out that plain
    PyTorch cannot do."""
    recorded = [case for case, _ in recorded_cases()]
    shapes = Counter(tuple(case.loss_input.teacher_indices.shape) for case in recorded)
    common = shapes.most_common(1)[0][0]
    found = []
    for case in recorded:
        if tuple(case.loss_input.teacher_indices.shape) != common:
            continue
        masked = not bool(case.loss_input.response_mask.all())
        if entry is Capability.DIVERGENCE and (masked or case.training.alpha >= 1):
            continue
        floating = {key: tensor.to(dtype) for key, tensor in case.tensors().items() if tensor.is_floating_point()}
        cast = replace(case.with_fields(**floating), name=case.name)
        cast = cast if entry is Capability.LOSS else cast.to_fused()
        if expectations(cast, entry).attainable:
            found.append(cast)
    return found


def first_finding(observation: Observation) -> str:
    """The first thing that a trainer did wrong, or an empty string."""
    found = findings(observation)
    return f"{found[0].requirements[0]}: {found[0].disagreement}" if found else ""


TIMED = Timed(truth=truth_of_tokens, recorded=recorded_alike, first_finding=first_finding)
