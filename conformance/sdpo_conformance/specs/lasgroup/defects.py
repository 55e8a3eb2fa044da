"""Known ways to get lasgroup's loss wrong, and other algorithms that are taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.lasgroup.pipeline import PIPELINE, mean_weight
from sdpo_conformance.specs.shared import catalogue as common
from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared import wrong_stages as wrong
from sdpo_conformance.specs.shared.catalogue import BESIDE, CAP, LOG_RATIO_CLAMP
from sdpo_conformance.specs.shared.defect import Maker, SpecDefect, executable, named
from sdpo_conformance.specs.shared.pipeline import Flow, accepting, around, both, replacing
from sdpo_conformance.specs.shared.wrong_teachers import teacher_defects

WORDS = {
    "topk": "distillation_topk",
    "add_tail": "distillation_add_tail",
    "alpha": "alpha",
    "clip": "is_clip",
    "old": "old_log_probs",
}
defect = Maker("lasgroup", "LAS", PIPELINE, WORDS)


# --- rollout weights ---


def without_weights(flow: Flow) -> Tensor:
    return flow.per_token * flow.ratio


def with_policy(flow: Flow) -> Tensor | None:
    """The current policy in place of old."""
    if flow.rollout is None:
        return None
    return (flow.chosen.detach() - flow.rollout).clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def by_token(flow: Flow) -> Tensor | None:
    if flow.rollout is None:
        return None
    return (flow.old - flow.rollout).clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def row_mean(flow: Flow) -> Tensor | None:
    """The row's mean log-ratio in place of its sum."""
    if flow.rollout is None:
        return None
    found = flow.old - flow.rollout
    if flow.per == "sequence":
        rows = flow.response_mask.sum(-1, keepdim=True).clamp(min=1.0)
        found = ((found * flow.response_mask).sum(-1, keepdim=True) / rows).expand_as(found)
    return found.clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)


def rollout_unclamped(flow: Flow) -> Tensor | None:
    if flow.rollout is None:
        return None
    found = flow.old - flow.rollout
    if flow.per == "sequence":
        found = (found * flow.response_mask).sum(-1, keepdim=True).expand_as(found)
    return found


def unmasked(flow: Flow) -> Tensor | None:
    """Padding keeps its weight."""
    return None if flow.rollout_log_ratio is None else flow.rollout_log_ratio.exp()


def uncapped(flow: Flow) -> Tensor | None:
    return flow.rollout_raw


def given_capped(before: Any, flow: Flow) -> Tensor:
    """Weights that are given, capped once more."""
    found: Tensor = before(flow)
    return found.clamp(max=flow.threshold) if flow.weights is not None else found


def always_normalised(flow: Flow) -> Tensor:
    return _weight(flow, normalises=True)


def never_normalised(flow: Flow) -> Tensor:
    return _weight(flow, normalises=False)


def _weight(flow: Flow, normalises: bool) -> Tensor:
    given, flow.normalises = flow.normalises, normalises
    found = PIPELINE.stages["rollout_weight"](flow)
    flow.normalises = given
    return found


def normalised_over(mask_of: str, capped: bool = True) -> Any:
    """The mean of the weights over another mask, or before the cap."""

    def weight(before: Any, flow: Flow) -> Tensor:
        if flow.rollout_capped is None or not flow.normalises:
            return before(flow)
        source = flow.rollout_capped if capped else flow.rollout_raw
        mean = mean_weight(source, getattr(flow, mask_of), flow.per)
        found = source / mean.clamp(min=1e-8)
        return found if capped else found.clamp(max=flow.threshold)

    return around("rollout_weight", weight)


def capped_together(flow: Flow) -> Tensor:
    """Ratio times weight under the ratio's cap."""
    found = flow.ratio * flow.rollout_weight
    return flow.per_token * (found if flow.clip is None else found.clamp(max=flow.clip))


def weights_once_for_all(flow: Flow) -> Tensor:
    """The weight takes the ratio's place."""
    has_weight = flow.weights is not None or flow.rollout is not None
    return flow.per_token * (flow.rollout_weight if has_weight else flow.ratio)


def weight_beside_ratio_alone(flow: Flow) -> Tensor:
    """The weight stands in the ratio's branch."""
    return flow.per_token if flow.clip is None else PIPELINE.stages["weighted"](flow)


def self_normalised(before: Any, flow: Flow) -> Tensor:
    """The weights divided by their mean over the tokens that count, wherever there are weights."""
    found: Tensor = before(flow)
    if flow.weights is None and flow.rollout is None:
        return found
    return found / ((found * flow.mask).sum() / flow.mask.sum().clamp(min=1.0)).clamp(min=1e-8)


def clamped_by_token(value: float) -> Any:
    """Each token's log-ratio clamped before a row's are summed."""

    def log_ratio(before: Any, flow: Flow) -> Tensor | None:
        if flow.rollout is None or flow.per != "sequence":
            return before(flow)
        found = ((flow.old - flow.rollout).clamp(-value, value) * flow.response_mask).sum(-1, keepdim=True)
        return found.expand_as(flow.old).clamp(-stages.LOG_CLAMP, stages.LOG_CLAMP)

    return around("rollout_log_ratio", log_ratio)


# --- reduction ---


def row_means(flow: Flow) -> Tensor:
    """A mean of row means, whatever the mode."""
    if flow.aggregation != "token-mean":
        return PIPELINE.stages["loss"](flow)
    return ((flow.weighted * flow.mask).sum(-1) / flow.lengths.clamp(min=1.0)).mean()


def always_token_mean(flow: Flow) -> Tensor:
    return (flow.weighted * flow.mask).sum() / flow.count


def without_row_mask(flow: Flow, loss_input: Any) -> None:
    """Rows without a teacher count."""
    flow.mask = flow.response_mask


def row_mask_in_sum_only(flow: Flow) -> Tensor:
    """The denominator counts rows without a teacher."""
    return flow.response_mask.sum().clamp(min=1.0)


def boolean_mask(flow: Flow, loss_input: Any) -> None:
    flow.mask = (flow.mask != 0).to(flow.mask)


def counting(flow: Flow) -> Tensor:
    return (flow.mask != 0).sum().clamp(min=1.0)


def unfloored(flow: Flow) -> Tensor:
    total = flow.mask.sum()
    return torch.where(total == 0, torch.ones_like(total), total)


def all_positions(flow: Flow) -> Tensor:
    return torch.tensor(float(max(flow.mask.numel(), 1)), dtype=flow.mask.dtype, device=flow.mask.device)


def empty_rows_count(flow: Flow) -> Tensor:
    return torch.tensor(max(flow.mask.shape[0], 1), device=flow.mask.device)


def plain_row_sum(flow: Flow) -> Tensor:
    """seq-mean-token-sum where seq-mean-token-mean is asked for."""
    given, flow.aggregation = flow.aggregation, flow.aggregation.replace("token-mean", "token-sum")
    found = PIPELINE.stages["loss"](flow) if given == "seq-mean-token-mean" else None
    flow.aggregation = given
    return PIPELINE.stages["loss"](flow) if found is None else found


def norm_by_tokens(flow: Flow) -> Tensor:
    """seq-mean-token-sum-norm divided by the tokens that count."""
    if flow.aggregation != "seq-mean-token-sum-norm":
        return PIPELINE.stages["loss"](flow)
    return (flow.weighted * flow.mask).sum() / flow.count


def norm_by_longest(flow: Flow) -> Tensor:
    """seq-mean-token-sum-norm divided by the longest response."""
    found = PIPELINE.stages["loss"](flow)
    share = flow.mask.shape[-1] / wrong.longest(flow.response_mask)
    return found * share if flow.aggregation == "seq-mean-token-sum-norm" else found


def norm_by_rows(flow: Flow) -> Tensor:
    """seq-mean-token-sum-norm averaged over rows as well."""
    found = PIPELINE.stages["loss"](flow)
    return found / flow.mask.shape[0] if flow.aggregation == "seq-mean-token-sum-norm" else found


def shifted_mask(flow: Flow) -> Tensor:
    return flow.mask.roll(1, dims=1)


def first_rows_mask(flow: Flow) -> Tensor:
    return flow.mask[:1].expand_as(flow.mask)


def ones(flow: Flow) -> Tensor:
    return torch.ones_like(flow.mask)


# --- other algorithms ---


CLAAS = both(wrong.OVER_TEACHERS_TOP_K, replacing(loss=always_token_mean))


def _accept_any_alpha(loss_input: Any, clean: bool = True) -> Flow:
    from types import SimpleNamespace

    fields = {**vars(loss_input)}
    training = vars(loss_input.training)
    if not training["full_logit_distillation"]:
        training = {**training, "alpha": 1.0}
    return PIPELINE.accept(SimpleNamespace(**{**fields, "training": SimpleNamespace(**training)}), clean)


def _accept_without_old(loss_input: Any, clean: bool = True) -> Flow:
    """Without old there is no ratio, and no error."""
    from types import SimpleNamespace

    training = vars(loss_input.training)
    if loss_input.old_log_probs is None:
        training = {**training, "is_clip": None}
    return PIPELINE.accept(SimpleNamespace(**{**vars(loss_input), "training": SimpleNamespace(**training)}), clean)


REFUSED = (
    defect(
        "sampled-any-alpha",
        "The sampled-token mode takes any alpha.",
        "TOK-3",
        "Refuse alpha other than 1.",
        lambda before: replace(before, accept=_accept_any_alpha),
    ),
    defect(
        "old-optional",
        "A missing old is taken for a ratio of 1.",
        "IS-8",
        "Raise where is_clip is set and old_log_probs is missing.",
        lambda before: replace(before, accept=_accept_without_old),
    ),
)

ROLLOUT = (
    defect(
        "no-rollout-weight",
        "Rollout weights are ignored.",
        "W-1",
        "Multiply D by them.",
        replacing(weighted=without_weights),
    ),
    defect(
        "weight-in-place-of-ratio",
        "A rollout weight takes the ratio's place.",
        "W-1",
        "Multiply by both.",
        replacing(weighted=weights_once_for_all),
    ),
    defect(
        "weight-needs-ratio",
        "Without a ratio, is_clip None, the rollout weight is left out as well.",
        "W-1",
        "Multiply D by the weight whatever is_clip is.",
        replacing(weighted=weight_beside_ratio_alone),
    ),
    defect(
        "capped-together",
        "The product of ratio and weight is capped at is_clip.",
        "W-1",
        "Cap each by itself.",
        replacing(weighted=capped_together),
    ),
    defect(
        "given-weights-capped",
        "Weights that are given are capped again.",
        "W-1",
        "Take them as they are.",
        around("rollout_weight", given_capped),
    ),
    defect(
        "weights-self-normalised",
        "Weights are divided by their mean, given ones too, whatever rollout_is_batch_normalize says.",
        "W-1",
        "Take them as they are; normalise computed ones where rollout_is_batch_normalize is on.",
        around("rollout_weight", self_normalised),
    ),
    defect(
        "rollout-inverted",
        "The rollout weight is rollout to old.",
        "W-2",
        "exp(old - rollout).",
        around("rollout_log_ratio", wrong.inverted),
    ),
    defect(
        "rollout-of-current-policy",
        "The rollout weight is taken of the current policy.",
        "W-2",
        "exp(old - rollout), once per batch.",
        replacing(rollout_log_ratio=with_policy),
    ),
    defect(
        "rollout-uncapped",
        "The rollout weight is not capped.",
        "W-3",
        "min(weight, rollout_is_threshold).",
        replacing(rollout_capped=uncapped),
    ),
    defect(
        "rollout-cap-constant",
        "The rollout weight's cap is a constant.",
        "W-3",
        "Read rollout_is_threshold.",
        **named(
            lambda value: replacing(
                rollout_capped=lambda flow: None if flow.rollout_raw is None else flow.rollout_raw.clamp(max=value)
            ),
            CAP,
        ),
    ),
    defect(
        "rollout-unclamped",
        "The rollout log-ratio is not clamped to +-20.",
        "W-4",
        "Clamp before exp.",
        replacing(rollout_log_ratio=rollout_unclamped),
    ),
    defect(
        "rollout-not-masked",
        "The rollout weight is not multiplied by the response mask.",
        "W-5",
        "weight = exp(...) * response_mask, then the cap.",
        replacing(rollout_raw=unmasked),
    ),
    defect(
        "rollout-by-token",
        "rollout_is = sequence gives a weight to each token.",
        "W-6",
        "One weight a row: exp of the sum of its log-ratios.",
        replacing(rollout_log_ratio=by_token),
    ),
    defect(
        "rollout-clamped-by-token",
        "rollout_is = sequence clamps each token's log-ratio before they are summed.",
        "W-6",
        "Sum the row's log-ratios, then clamp the sum to +-20.",
        **named(clamped_by_token, replace(LOG_RATIO_CLAMP, values=(1.0, 2.0, 5.0, 10.0))),
    ),
    defect(
        "rollout-row-mean",
        "rollout_is = sequence takes the mean log-ratio.",
        "W-6",
        "One weight a row: exp of the sum of its log-ratios.",
        replacing(rollout_log_ratio=row_mean),
    ),
    defect(
        "rollout-not-normalised",
        "rollout_is_batch_normalize is ignored.",
        "W-7",
        "Divide by the weights' mean where it is on.",
        replacing(rollout_weight=never_normalised),
    ),
    defect(
        "rollout-always-normalised",
        "Weights are divided by their mean without being asked.",
        "W-7",
        "Divide where rollout_is_batch_normalize is on.",
        replacing(rollout_weight=always_normalised),
    ),
    defect(
        "rollout-normalised-before-cap",
        "Weights are divided by their mean before the cap.",
        "W-7",
        "Cap, then divide.",
        normalised_over("response_mask", capped=False),
    ),
    defect(
        "rollout-normalised-over-teacher-rows",
        "The weights' mean is taken over rows with a teacher only.",
        "W-7",
        "The mean runs over the response mask.",
        normalised_over("mask"),
    ),
)

REDUCTION = (
    defect(
        "row-means",
        "Each row is averaged before the rows are.",
        "RED-1",
        "One mean over all tokens.",
        replacing(loss=row_means),
    ),
    defect(
        "all-positions",
        "The denominator counts every position.",
        "RED-1",
        "max(sum of the mask, 1).",
        replacing(count=all_positions),
    ),
    defect(
        "mask-ignored",
        "The mask is ignored.",
        "RED-2",
        "Multiply by the mask.",
        wrong.accepting_mask(ones),
    ),
    defect(
        "mask-shifted",
        "The mask is one token late.",
        "RED-2",
        "mask[t] belongs to token t.",
        wrong.accepting_mask(shifted_mask),
    ),
    defect(
        "mask-of-first-row",
        "Every row has the first row's mask.",
        "RED-2",
        "Each row has its own.",
        wrong.accepting_mask(first_rows_mask),
    ),
    defect(
        "teacherless-rows-count",
        "Rows without a teacher count.",
        "RED-3",
        "mask = response_mask * self_distillation_mask[:, None].",
        accepting(without_row_mask),
    ),
    defect(
        "teacherless-rows-in-denominator",
        "Rows without a teacher are in the denominator.",
        "RED-3",
        "Both sums take the product of the masks.",
        replacing(count=row_mask_in_sum_only),
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
        "The denominator counts tokens under a fractional mask.",
        "RED-4",
        "max(sum of the mask, 1).",
        replacing(count=counting),
    ),
    defect(
        "count-with-epsilon",
        "A constant is added to the number of tokens.",
        "RED-8",
        "max(sum of the mask, 1), nothing beside it.",
        **named(wrong.increased("count"), BESIDE),
    ),
    defect(
        "denominator-unfloored",
        "The denominator has no floor of 1.",
        "RED-5",
        "max(sum of the mask, 1).",
        replacing(count=unfloored),
    ),
    defect(
        "always-token-mean",
        "loss_agg_mode is ignored.",
        "RED-6",
        "Read loss_agg_mode.",
        replacing(loss=always_token_mean),
        usable_for="loss_agg_mode = token-mean.",
    ),
    defect(
        "row-sum-for-row-mean",
        "seq-mean-token-mean is computed as seq-mean-token-sum.",
        "RED-6",
        "Divide each row by its mask's sum + 1e-8.",
        replacing(loss=plain_row_sum),
    ),
    defect(
        "norm-by-tokens",
        "seq-mean-token-sum-norm divides by the tokens that count.",
        "RED-6",
        "Divide by T, the mask's width.",
        replacing(loss=norm_by_tokens),
    ),
    defect(
        "norm-by-longest",
        "seq-mean-token-sum-norm divides by the longest response, not by T.",
        "RED-6",
        "Divide by T, the mask's width, padding included.",
        replacing(loss=norm_by_longest),
    ),
    defect(
        "norm-by-rows",
        "seq-mean-token-sum-norm is averaged over rows as well.",
        "RED-6",
        "Divide by T alone.",
        replacing(loss=norm_by_rows),
    ),
    defect(
        "empty-rows-count",
        "A row mean counts rows without a token.",
        "RED-7",
        "The mean runs over rows that have one.",
        replacing(row_count=empty_rows_count),
    ),
)


def by_own_counts(flow: Flow, loss_input: Any) -> None:
    """The counts of the whole batch are not read."""
    flow.tokens = flow.sequences = None


def before_weights(flow: Flow) -> Tensor:
    """The mean of D without ratio and weight."""
    weighted, flow.weighted = flow.weighted, flow.per_token
    found = PIPELINE.stages["loss"](flow).detach()
    flow.weighted = weighted
    return found


STEP = (
    defect(
        "counts-ignored",
        "batch_num_tokens and global_batch_size are ignored: each micro-batch takes its own mean.",
        "AGG-1",
        "Divide by the whole batch's counts where they are given.",
        accepting(by_own_counts),
        usable_for="steps of one micro-batch.",
    ),
    defect(
        "count-kept",
        "The first micro-batch's number of tokens is kept for those after it.",
        "AGG-2",
        "Sum each micro-batch's own mask.",
        wrong.kept_for_the_step("count"),
    ),
    defect(
        "logs-before-weights",
        "pg_loss is taken before ratio and weight: not what is trained.",
        "MET-1",
        "Report the loss itself.",
        wrong.measuring(pg_loss=before_weights),
    ),
)

INSTEAD = "Compute lasgroup's loss (docs/spec-lasgroup.md), or judge this with the spec it follows."

DIALECTS = (
    defect(
        "is-claas",
        "This computes CLaaS's loss (teacher top-k, no tail, 0 at alpha = 0), not lasgroup's.",
        "SUP-1",
        INSTEAD,
        CLAAS,
        dialect="CLaaS's loss",
        usable_for="--spec claas.",
    ),
    defect(
        "is-trl",
        "This computes TRL's loss (a mean of row means), not lasgroup's.",
        "RED-1",
        INSTEAD,
        replacing(loss=lambda flow: ((flow.weighted * flow.mask).sum(-1) / flow.lengths.clamp(min=1.0)).mean()),
        dialect="TRL's loss with distillation_add_tail",
        usable_for="--spec trl.",
    ),
    defect(
        "is-trl-renormalised",
        "This computes TRL's loss (no tail, a mean of row means), not lasgroup's.",
        "TAIL-1",
        INSTEAD,
        both(
            wrong.WITHOUT_TAIL,
            replacing(loss=lambda flow: ((flow.weighted * flow.mask).sum(-1) / flow.lengths.clamp(min=1.0)).mean()),
        ),
        dialect="TRL's loss",
        usable_for="--spec trl.",
    ),
    defect(
        "is-without-tail-on-teacher",
        "This computes the renormalised divergence over the teacher's top-k.",
        "SUP-1",
        INSTEAD,
        both(replacing(support=wrong.teachers_support), wrong.WITHOUT_TAIL),
        dialect="ms-swift's divergence",
        usable_for="--spec ms-swift.",
    ),
    defect(
        "is-gkd",
        "This computes the divergence over the whole vocabulary.",
        "SUP-2",
        INSTEAD,
        wrong.OVER_ALL,
        dialect="GKD's divergence",
        usable_for="distillation_topk = None.",
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
)

FAMILIES: Mapping[str, tuple[SpecDefect, ...]] = {
    "support": common.support_defects(defect),
    "tail": common.tail_defects(defect),
    "divergence": common.divergence_defects(defect),
    "sampled token": (*common.sampled_defects(defect), *REFUSED[:1]),
    "temperature": common.temperature_defects(defect),
    "ratio": (*common.ratio_defects(defect), *REFUSED[1:]),
    "rollout weight": ROLLOUT,
    "reduction": (
        *REDUCTION,
        *common.mask_defects(defect),
        common.empty_defect(defect, "RED-5", lambda flow: (flow.mask != 0).sum()),
    ),
    "step": STEP,
    "kept": common.kept_defects(defect, "response_mask"),
    "plumbing": common.plumbing_defects(defect),
}

TEACHERS = teacher_defects("lasgroup", "LAS")
"""Known ways to get the EMA teacher wrong; they compute no loss."""


@cache
def catalogue() -> Mapping[str, SpecDefect]:
    """Every defect by name; dialects are apart."""
    return MappingProxyType({one.name: one for family in FAMILIES.values() for one in family})


def load(name: str) -> Any:
    """The executable form of an entry, or of two as ``one+other``, as ``--impl=defect:NAME`` takes it."""
    return executable(name, catalogue(), DIALECTS, TEACHERS)
