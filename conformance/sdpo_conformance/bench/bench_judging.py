"""Whether a row's answer is right: its error against the oracle on the timed inputs, and the recorded cases.

Two questions. Does the implementation compute this spec: the recorded upstream cases (the trainer: one scenario),
judged as the suite judges them; ``sdpo_conformance.run`` says more. Is the timed answer right: ``truth``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.bench.bench_inputs import Inputs
from sdpo_conformance.bench.subjects import TimedSubject
from sdpo_conformance.bench.truth import (
    factor,
    kept_tokens,
    product,
    rounding,
    slice_logits,
    slice_truth,
    timed,
    work_inputs,
)
from sdpo_conformance.bench.workloads import Direction, Workload
from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.judging.call import ImplementationError, evaluate
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, compare
from sdpo_conformance.judging.implementation import Implementation
from sdpo_conformance.protocol import METRIC_KEYS, Capability
from sdpo_conformance.specs import DEFAULT, find_spec


@dataclass(frozen=True)
class Verdict:
    """``error`` as shown, and what it is of; ``wrong``: one line, empty for a right answer."""

    error: float | None
    of: str
    wrong: str = ""
    details: dict[str, Any] | None = None


UNJUDGED = Verdict(None, "not judged")


def judge(subject: TimedSubject, work: Workload) -> Verdict:
    """The timed answer against the truth; subjects of another objective and steps are not judged here."""
    if work.direction is Direction.STEP or (subject.other and subject.entry is not Capability.DIVERGENCE):
        return UNJUDGED
    if work.direction is Direction.LOGPROBS:
        return judge_logprobs(subject, work)
    if work.direction is Direction.TOPK:
        return judge_topk(subject, work)
    return judge_loss(subject, work)


def judge_loss(subject: TimedSubject, work: Workload) -> Verdict:
    """The loss of a slice of the tokens and, for both directions, the whole run's gradient at those tokens."""
    assert subject.loss is not None
    bare = subject.entry is Capability.DIVERGENCE
    truth = slice_truth(replace(work, direction=Direction.BOTH, anchor=0.0 if bare else work.anchor), bare)
    with torch.no_grad():
        loss = float(subject.loss(truth.inputs))
    loss_error = truth.loss_error(loss)
    details: dict[str, Any] = {"loss_error": loss_error, "allowed_loss_error": truth.allowed_loss}
    wrong = "" if loss_error <= truth.allowed_loss else wrong_by("loss", loss_error, truth.allowed_loss)
    if work.direction is Direction.FORWARD:
        return Verdict(loss_error, "loss", wrong, details)
    inputs = work_inputs(work)
    gradient = subject.run(inputs).detach()[:, truth.keep.to(inputs.hidden.device)].double()
    errors = truth.gradient_errors(gradient * (work.tokens / len(truth.keep)))
    details |= {"gradient_errors": errors, "allowed_gradient_errors": truth.allowed_gradient}
    for error, allowed in zip(errors, truth.allowed_gradient, strict=True):
        if not error <= allowed and not wrong:
            wrong = wrong_by("gradient", error, allowed)
    return Verdict(errors[0], "gradient", wrong, details)


def wrong_by(what: str, error: float, allowed: float) -> str:
    return f"{what} off by {error:.2g}, at most {allowed:.2g} is rounding"


def logprobs_yardstick(work: Workload, inputs: Inputs) -> tuple[Tensor, float]:
    """True log-probs (S, V) float64 on the CPU, and the error in nats that is still rounding."""
    logits = slice_logits(work.workload, work.tokens, work.top_k, work.dtype, work.device, work.support)[0]
    true = logits.log_softmax(-1)
    with torch.no_grad():
        eager = (inputs.hidden[0] @ inputs.head.T).log_softmax(-1).double().cpu()
    reach = float(logits.abs().max()) + float(true.abs().max())
    return true, factor(work) * float((eager - true).abs().max()) + min(rounding(work), 1e-6) * reach


def sliced(work: Workload, whole: Inputs) -> tuple[Tensor, Inputs]:
    keep = kept_tokens(work).to(whole.hidden.device)
    return keep, whole.tokens(keep)


def judge_logprobs(subject: TimedSubject, work: Workload) -> Verdict:
    """The largest error in nats over a slice of the tokens of a whole run."""
    whole = work_inputs(work)
    keep, inputs = sliced(work, whole)
    true, allowed = logprobs_yardstick(work, inputs)
    got = subject.run(whole)[0, keep].double().cpu()
    error = largest(got - true.gather(-1, inputs.response_ids[0].cpu().unsqueeze(-1)).squeeze(-1))
    wrong = "" if error <= allowed else wrong_by("log-prob", error, allowed)
    return Verdict(error, "log-prob", wrong, {"allowed_error": allowed})


def judge_topk(subject: TimedSubject, work: Workload) -> Verdict:
    """Log-probs at the returned ids, and that no id left out is likelier by more than rounding."""
    whole = work_inputs(work)
    keep, _ = sliced(work, whole)
    teacher = replace(whole, hidden=whole.teacher_hidden).tokens(keep)
    true = product_logprobs(teacher)
    with torch.no_grad():
        eager = (teacher.hidden[0] @ teacher.head.T).log_softmax(-1).double().cpu()
    allowed = factor(work) * float((eager - true).abs().max()) + min(rounding(work), 1e-6) * float(true.abs().max())
    values, indices = (tensor[0, keep].cpu() for tensor in subject.run(whole))
    error = largest(values.double() - true.gather(-1, indices.long()))
    wrong = "" if error <= allowed else wrong_by("log-prob", error, allowed)
    last = true.topk(indices.shape[-1], dim=-1).values[:, -1]
    short = float((last - true.gather(-1, indices.long()).min(-1).values).max())
    ordered = indices.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        wrong = "a token id twice in one support"
    elif short > allowed:
        wrong = f"a token of the support is {short:.2g} nats less likely than one left out"
    return Verdict(error, "log-prob", wrong, {"allowed_error": allowed, "support_short_by": max(short, 0.0)})


def product_logprobs(inputs: Inputs) -> Tensor:
    """(S, V) float64 on the CPU."""
    return product(inputs.hidden.detach()[0], inputs.head).log_softmax(-1)


def largest(difference: Tensor) -> float:
    """The largest absolute entry; a NaN counts as infinite."""
    return float(torch.nan_to_num(difference.abs(), nan=float("inf")).max())


def nonconformity(implementation: Implementation, entry: Capability, device: str) -> str:
    """One line on how an entry fails the recorded cases (``distill``: a scenario); empty where it passes.

    Log-probs and top-k have no recorded cases: their timed answer is judged whole.
    """
    if entry is Capability.DISTILL:
        return distill_nonconformity(implementation, device)
    if entry not in (Capability.LOSS, Capability.FUSED, Capability.DIVERGENCE):
        return ""
    function, failed, first = getattr(implementation.object, entry.value), 0, ""
    parts = find_spec(DEFAULT).parts
    claimed = implementation.claims.dtypes
    dtype = DTYPES["float32" if claimed is None or "float32" in claimed else claimed[0]]
    cases = timed().recorded(entry, dtype)
    for case in cases:
        try:
            aspects = ("divergence", GRADIENT) if entry is Capability.DIVERGENCE else ("loss", *METRIC_KEYS, GRADIENT)
            found: Disagreement | str | None = compare(
                case, evaluate(function, entry, case, device), aspects, parts.expectations(case, entry)
            )
        except ImplementationError as error:
            if error.device_lost:
                raise
            found = error.summary
        if found is not None:
            failed, first = failed + 1, first or f"{case.name}: {found}"
    return f"{failed} of {len(cases)} recorded cases wrong; {first}" if failed else ""


def distill_nonconformity(implementation: Implementation, device: str) -> str:
    """What a scenario of several samples and steps finds."""
    from sdpo_conformance.trainer.observation import run
    from sdpo_conformance.trainer.scenarios import SCENARIOS, within_claims

    scenario = within_claims(SCENARIOS[0], implementation.claims)
    try:
        return timed().first_finding(run(implementation.object.distill, scenario, device))
    except ImplementationError as error:
        return error.summary
