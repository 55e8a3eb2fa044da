"""Known ways to get TRL's loss wrong, and other algorithms that are taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.shared import catalogue as common
from sdpo_conformance.specs.shared import wrong_stages as wrong
from sdpo_conformance.specs.shared.defect import Maker, SpecDefect, executable, named
from sdpo_conformance.specs.shared.pipeline import Flow, Pipeline, Result, accepting, around, both, replacing
from sdpo_conformance.specs.shared.wrong_teachers import teacher_defects
from sdpo_conformance.specs.trl.pipeline import PIPELINE

WORDS = {
    "topk": "distillation_topk",
    "add_tail": "distillation_add_tail",
    "alpha": "distillation_alpha",
    "clip": "distillation_is_clip",
    "old": "old_per_token_logps",
}
defect = Maker("trl", "TRL", PIPELINE, WORDS)

# --- reduction ---


def token_mean(flow: Flow) -> Tensor:
    """One mean over the tokens that count."""
    found: Tensor = (flow.weighted * flow.mask).sum() / flow.mask.sum().clamp(min=1.0)
    return found


def filled_rows(flow: Flow) -> Tensor:
    """Only rows with a token."""
    found: Tensor = (flow.mask.sum(-1) > 0).sum().clamp(min=1)
    return found


def rows_with_teacher(flow: Flow) -> Tensor:
    """Only rows with a teacher."""
    if flow.rows is None:
        return PIPELINE.stages["row_count"](flow)
    found: Tensor = flow.rows.sum().clamp(min=1.0)
    return found


def no_rows(flow: Flow) -> Tensor:
    """The sum over rows."""
    return torch.ones((), dtype=flow.mask.dtype, device=flow.mask.device)


def by_response(flow: Flow) -> Tensor:
    """The row's denominator counts the completion, whether its row has a teacher or not."""
    found: Tensor = flow.response_mask.sum(-1).clamp(min=1.0)
    return found


def unfloored(flow: Flow) -> Tensor:
    total: Tensor = flow.mask.sum(-1)
    return torch.where(total == 0, torch.ones_like(total), total)


def counting(flow: Flow) -> Tensor:
    found: Tensor = (flow.mask != 0).sum(-1).clamp(min=1.0)
    return found


def width(flow: Flow) -> Tensor:
    """Every row divided by T."""
    return torch.full_like(
        flow.mask[:, 0] if flow.mask.shape[1] else flow.mask.sum(-1), float(max(flow.mask.shape[1], 1))
    )


def boolean_mask(flow: Flow, loss_input: Any) -> None:
    flow.mask = (flow.mask != 0).to(flow.mask)


def without_row_mask(flow: Flow, loss_input: Any) -> None:
    flow.mask = flow.response_mask


def _with_training(loss_input: Any, **changes: Any) -> Any:
    training = SimpleNamespace(**{**vars(loss_input.training), **changes})
    return SimpleNamespace(**{**vars(loss_input), "training": training})


def _any_alpha(loss_input: Any, clean: bool = True) -> Flow:
    sampled = loss_input.training.distillation_mode == "sampled_token"
    return PIPELINE.accept(_with_training(loss_input, distillation_alpha=1.0) if sampled else loss_input, clean)


def _any_k(loss_input: Any, clean: bool = True) -> Flow:
    k = min(loss_input.training.distillation_topk or 20, loss_input.student_logits.shape[-1])
    return PIPELINE.accept(_with_training(loss_input, distillation_topk=k), clean)


def _old_required(loss_input: Any, clean: bool = True) -> Flow:
    if loss_input.training.distillation_is_clip is not None and loss_input.old_per_token_logps is None:
        raise ValueError("old_per_token_logps is required")
    return PIPELINE.accept(loss_input, clean)


def _unanswered(loss_input: Any, clean: bool = True) -> Flow:
    if loss_input.teacher_actual_logprobs is None:
        return PIPELINE.accept(loss_input, clean)
    actual = torch.nan_to_num(loss_input.teacher_actual_logprobs, nan=0.0, neginf=0.0)
    return PIPELINE.accept(SimpleNamespace(**{**vars(loss_input), "teacher_actual_logprobs": actual}), clean)


def _alpha_of_server(loss_input: Any, clean: bool = True) -> Flow:
    training = loss_input.training
    if training.distillation_mode == "sampled_token" and training.distillation_alpha != 1:
        raise ValueError("distillation_alpha must be 1")
    return PIPELINE.accept(loss_input, clean)


def accepting_with(accept: Any) -> Any:
    """Another ``accept``."""
    return lambda before: replace(before, accept=accept)


def served_tempered(before: Any, flow: Flow) -> Tensor:
    """A served teacher's log-probs divided by the temperature once more."""
    found: Tensor = before(flow)
    return found / flow.temperature if flow.served and not flow.sampled else found


def served_renormalised(before: Any, flow: Flow) -> Tensor:
    """A served teacher's log-probs normalised over its top-k: nothing is left for a tail."""
    found: Tensor = before(flow)
    return found.log_softmax(-1) if flow.served and not flow.sampled else found


def _finite_everywhere(loss_input: Any, clean: bool = True) -> Flow:
    actual = loss_input.teacher_actual_logprobs
    if actual is not None and not bool(torch.isfinite(actual).all()):
        raise ValueError("the teacher server gave no log-prob for a token")
    return PIPELINE.accept(loss_input, clean)


def _finite_up_to_longest(loss_input: Any, clean: bool = True) -> Flow:
    counted = loss_input.completion_mask != 0
    places = torch.arange(1, counted.shape[-1] + 1, device=counted.device)
    longest = int((counted * places).amax()) if counted.numel() else 0
    actual = loss_input.teacher_actual_logprobs
    if actual is not None and not bool(torch.isfinite(actual[:, :longest]).all()):
        raise ValueError("the teacher server gave no log-prob for a token")
    return PIPELINE.accept(loss_input, clean)


def students_own(before: Any, flow: Flow) -> Tensor:
    """As many of the student's largest, whoever holds the teacher."""
    found: Tensor = before(flow)
    return flow.l.topk(found.shape[-1], dim=-1).indices if flow.served and not flow.sampled else found


def among_the_served(before: Any, flow: Flow) -> Tensor:
    """The served log-probs at another support, -30 where the server said nothing."""
    found: Tensor = before(flow)
    if not flow.served or flow.sampled:
        return found
    known = torch.full_like(flow.l, -30.0).scatter(-1, flow.served_ids, found.to(flow.l.dtype))
    return known.gather(-1, flow.support)


def served_padding(flow: Flow, loss_input: Any) -> None:
    """A served teacher's log-probs as they are where nothing counts."""
    if loss_input.teacher_topk_logprobs is not None:
        flow.served_logprobs = loss_input.teacher_topk_logprobs.to(flow.z.dtype)


def logging_token_mean(before: Pipeline) -> Pipeline:
    """The logged number is the token mean, not the objective."""

    def result(flow: Flow) -> Result:
        return {"loss": flow.loss, "logged_distillation_loss": token_mean(flow).detach()}

    return replace(before, result=result)


def token_mean_where_evaluated(before: Any, flow: Flow) -> Tensor:
    """The mean over all tokens, which is what is logged, where no gradient is asked for."""
    if torch.is_grad_enabled():
        found: Tensor = before(flow)
        return found
    mean: Tensor = (flow.weighted * flow.mask).sum() / flow.mask.sum().clamp(min=1.0)
    return mean


REDUCTION = (
    defect(
        "evaluates-token-mean",
        "Without gradients the mean over all tokens is returned, not the mean of row means that is trained.",
        "GRAD-6",
        "Return the same loss under no_grad: average each row, then the rows.",
        around("loss", token_mean_where_evaluated),
    ),
    defect(
        "lengths-with-epsilon",
        "A constant is added to a row's number of tokens.",
        "RED-8",
        "max(sum of the row's mask, 1), nothing beside it.",
        **named(wrong.increased("lengths"), common.BESIDE),
    ),
    defect(
        "token-mean",
        "One mean over all tokens is taken.",
        "RED-1",
        "Average each row, then the rows.",
        replacing(loss=token_mean),
        usable_for="Rows of equal length.",
    ),
    defect(
        "rows-summed",
        "The row means are summed.",
        "RED-7",
        "Divide by B.",
        replacing(row_count=no_rows),
    ),
    defect(
        "rows-by-width",
        "Each row is divided by T.",
        "RED-1",
        "Divide by max(sum_t M, 1).",
        replacing(lengths=width),
    ),
    defect(
        "mask-ignored",
        "The mask is ignored.",
        "RED-2",
        "Multiply by the mask.",
        wrong.accepting_mask(lambda flow: torch.ones_like(flow.mask)),
    ),
    defect(
        "mask-shifted",
        "The mask is one token late.",
        "RED-2",
        "mask[t] belongs to token t.",
        wrong.accepting_mask(lambda flow: flow.mask.roll(1, dims=1)),
    ),
    defect(
        "mask-of-first-row",
        "Every row has the first row's mask.",
        "RED-2",
        "Each row has its own.",
        wrong.accepting_mask(lambda flow: flow.mask[:1].expand_as(flow.mask)),
    ),
    defect(
        "teacherless-rows-count",
        "Rows without a teacher are distilled.",
        "RED-3",
        "M = completion_mask * self_distillation_mask[:, None].",
        accepting(without_row_mask),
    ),
    defect(
        "teacherless-rows-leave-b",
        "Rows without a teacher are not in B.",
        "RED-3",
        "B counts every row.",
        replacing(row_count=rows_with_teacher),
    ),
    defect(
        "boolean-mask",
        "A fractional mask is read as true.",
        "RED-4",
        "The mask is a weight.",
        accepting(boolean_mask),
    ),
    defect(
        "mask-counted",
        "A row's denominator counts tokens under a fractional mask.",
        "RED-4",
        "max(sum_t M, 1).",
        replacing(lengths=counting),
    ),
    defect(
        "row-unfloored",
        "A row's denominator has no floor of 1.",
        "RED-5",
        "max(sum_t M, 1).",
        replacing(lengths=unfloored),
    ),
    defect(
        "empty-rows-leave-b",
        "Rows without a token are not in B.",
        "RED-6",
        "B counts every row.",
        replacing(row_count=filled_rows),
    ),
)

REFUSED = (
    defect(
        "sampled-any-alpha",
        "sampled_token takes any alpha.",
        "TOK-3",
        "Refuse alpha other than 1.",
        accepting_with(_any_alpha),
    ),
    defect(
        "any-topk",
        "topk_logits takes a missing or too large {topk}.",
        "SUP-4",
        "Refuse it.",
        accepting_with(_any_k),
    ),
    defect(
        "old-required",
        "A missing {old} is refused.",
        "IS-8",
        "Without it there is no ratio.",
        accepting_with(_old_required),
    ),
)

SERVER = (
    defect(
        "served-student-support",
        "With a served teacher the support is the student's top-k.",
        "SRV-1",
        "The teacher's own top-k: the server can score nothing else.",
        both(around("support", students_own), around("b", among_the_served)),
    ),
    defect(
        "served-tempered",
        "A served teacher's log-probs are divided by the temperature.",
        "SRV-1",
        "The server applies it: take them as they are.",
        around("b", served_tempered),
    ),
    defect(
        "served-renormalised",
        "A served teacher's log-probs are normalised over its top-k: its tail is empty.",
        "SRV-1",
        "They are log-probs of the whole vocabulary: take them as they are.",
        around("b", served_renormalised),
    ),
    defect(
        "served-padding-refused",
        "A served log-prob that is not finite is refused where nothing counts, too.",
        "SRV-2",
        "Ask for finite log-probs where the mask is not 0 alone.",
        accepting_with(_finite_everywhere),
    ),
    defect(
        "served-short-rows-refused",
        "A served log-prob that is not finite is refused up to the batch's longest completion.",
        "SRV-2",
        "Ask for finite log-probs where the mask is not 0 alone: shorter rows come back padded with -inf.",
        accepting_with(_finite_up_to_longest),
    ),
    defect(
        "served-padding-leaks",
        "A served teacher's padding of -inf reaches the loss.",
        "SRV-2",
        "Set both sides' log-probs to 0 where nothing counts.",
        accepting(served_padding),
    ),
    defect(
        "served-missing-accepted",
        "A token that counts may lack its served log-prob.",
        "SRV-3",
        "Refuse it.",
        accepting_with(_unanswered),
    ),
    defect(
        "served-alpha-checked",
        "sampled_token with a served teacher refuses other alphas.",
        "SRV-4",
        "The server path does not read alpha in this mode.",
        accepting_with(_alpha_of_server),
    ),
)

STEP = (
    defect(
        "row-lengths-kept",
        "The first micro-batch's row lengths are kept for those after it.",
        "AGG-1",
        "Sum each micro-batch's own mask.",
        wrong.kept_for_the_step("lengths"),
    ),
)

LOGGED = (
    defect(
        "logs-token-mean",
        "The logged loss is a token mean: not what is trained.",
        "MET-1",
        "Log the loss itself.",
        logging_token_mean,
    ),
)

INSTEAD = "Compute TRL's loss (docs/spec-trl.md), or judge this with the spec it follows."
DIALECTS = (
    defect(
        "is-lasgroup",
        "This computes lasgroup's loss (one token mean), not TRL's.",
        "RED-1",
        INSTEAD,
        replacing(loss=token_mean),
        dialect="lasgroup's loss",
        usable_for="--spec lasgroup.",
    ),
    defect(
        "is-claas",
        "This computes CLaaS's loss (teacher top-k, a token mean, 0 at alpha = 0), not TRL's.",
        "SUP-1",
        INSTEAD,
        both(wrong.OVER_TEACHERS_TOP_K, replacing(loss=token_mean)),
        dialect="CLaaS's loss",
        usable_for="--spec claas.",
    ),
    defect(
        "is-gkd",
        "This computes the divergence over the whole vocabulary.",
        "SUP-2",
        INSTEAD,
        wrong.OVER_ALL,
        dialect="GKD's divergence",
        usable_for="distillation_mode = full_logits.",
    ),
    defect(
        "is-verl-topk",
        "This computes verl's forward_kl_topk.",
        "SUP-1",
        INSTEAD,
        wrong.FORWARD_KL_TOP_K,
        dialect="verl's forward_kl_topk",
        usable_for="--spec verl-topk.",
    ),
    defect(
        "is-teacher-support",
        "This computes TRL's server path: the divergence over the teacher's top-k.",
        "SUP-1",
        INSTEAD,
        both(replacing(support=wrong.teachers_support), around("log_q", lambda before, flow: before(flow))),
        dialect="TRL's server path",
        usable_for="use_teacher_server = True.",
    ),
)

FAMILIES: Mapping[str, tuple[SpecDefect, ...]] = {
    "support": (*common.support_defects(defect), REFUSED[1]),
    "tail": common.tail_defects(defect),
    "divergence": common.divergence_defects(defect),
    "sampled token": (*common.sampled_defects(defect), REFUSED[0]),
    "temperature": common.temperature_defects(defect),
    "ratio": (*common.ratio_defects(defect), REFUSED[2]),
    "reduction": (
        *REDUCTION,
        *common.mask_defects(defect),
        common.empty_defect(defect, "RED-5", lambda flow: (flow.mask != 0).sum()),
    ),
    "server": SERVER,
    "step": STEP,
    "metric": LOGGED,
    "kept": common.kept_defects(defect, "completion_mask"),
    "plumbing": common.plumbing_defects(defect),
}

TEACHERS = teacher_defects("trl", "TRL")
"""Known ways to get the EMA teacher wrong; they compute no loss."""


@cache
def catalogue() -> Mapping[str, SpecDefect]:
    """Every defect by name; dialects are apart."""
    return MappingProxyType({one.name: one for family in FAMILIES.values() for one in family})


def load(name: str) -> Any:
    """The executable form of an entry, or of two as ``one+other``, as ``--impl=defect:NAME`` takes it."""
    return executable(name, catalogue(), DIALECTS, TEACHERS)
