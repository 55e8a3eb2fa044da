"""The recorded cases that lie within a corner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

import torch

from sdpo_conformance.judging.call import is_fused_entry
from sdpo_conformance.protocol import RATIO_LOG_CLAMP, Capability
from sdpo_conformance.specs.claas.corners import Corner
from sdpo_conformance.specs.claas.loss_case import LossCase, recorded_cases


@lru_cache(maxsize=1)
def _recorded() -> tuple[LossCase, ...]:
    return tuple(case for case, _ in recorded_cases())


def recorded_within(corner: Corner, entry: Capability, dtypes: Iterable[torch.dtype]) -> Iterator[LossCase]:
    """The recorded cases that lie within ``corner``, in the widest of ``dtypes``, for ``entry``."""
    widest = max(dtypes, key=lambda dtype: -torch.finfo(dtype).eps)
    for number, case in enumerate(_recorded()):
        if admits(corner, case):
            yield _converted(number, widest, is_fused_entry(entry))


@cache
def _converted(number: int, dtype: torch.dtype, fused: bool) -> LossCase:
    """One object for every requirement that judges the case: its truth and its bounds are computed once."""
    case = _recorded()[number]
    floats = {key: value.to(dtype) for key, value in case.tensors().items() if value.is_floating_point()}
    converted = LossCase(case.with_fields(**floats).loss_input, name=case.name)
    return converted.to_fused() if fused else converted


def admits(corner: Corner, case: LossCase) -> bool:
    """Whether a recorded case visits no dimension that ``corner`` keeps neutral."""
    training, loss_input, truth = case.training, case.loss_input, case.truth
    off_policy = bool(((truth.chosen - loss_input.old_student_logprobs).abs() > 1e-6).any())
    if off_policy and set(corner.ratio) <= {"on_policy"}:
        return False
    beyond = (truth.chosen - loss_input.old_student_logprobs).abs() > RATIO_LOG_CLAMP
    if bool(beyond.any()) and not {"clamp_high", "clamp_low", "infinite"} & set(corner.ratio):
        return False
    if bool(torch.isinf(loss_input.old_student_logprobs).any()) and "infinite" not in corner.ratio:
        return False
    if training.is_clip <= 1 and not set(corner.is_clip) & {"low", "one"}:
        return False
    if training.is_clip > 1e5 and "huge" not in corner.is_clip:
        return False
    if training.kl_reg_weight != 0 and "on" not in corner.anchor:
        return False
    alpha_kind = {0.0: "zero", 1.0: "one"}.get(training.alpha, "inside")
    if alpha_kind not in corner.alpha and not (alpha_kind == "inside" and set(corner.alpha) - {"zero", "one"}):
        return False
    mask = loss_input.response_mask.double()
    if not bool((mask == 1).all()) and set(corner.mask) <= {"full"}:
        return False
    if not bool(mask.any()) and "empty" not in corner.mask:
        return False
    if training.alpha < 1 and truth.divergence is not None:
        floored = truth.divergence.on_floor.any() or (loss_input.teacher_logprobs.logsumexp(-1) < -18.4).any()
        if bool(floored) and not {"teacher_floor", "student_floor"} & set(corner.mass):
            return False
    return True
