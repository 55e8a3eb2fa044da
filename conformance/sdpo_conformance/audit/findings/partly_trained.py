"""Tensors that no gradient reached although their neighbours were trained: left alone, or shrunk by weight decay."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sdpo_conformance.audit.adapter_change import AdapterChange, ModuleChange, TensorChange
from sdpo_conformance.audit.errors import shown
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.header import SPACING

_SHOWN = 5
#: How far a change may point away from the tensor itself, as a part of it, and factors may lie apart.
_ASIDE = 0.1
_APART = 0.2
_FEWEST_ELEMENTS = 16
#: What is less than this part of what it was has lost more than weight decay takes.
_LOST = 0.75
#: LoRA+ moves lora_B sixteen times as fast as lora_A: a move has to be seen all the same.
_SEEN = 32.0
#: Words by which a run says that it freezes a factor: LoRA-FA and FFA-LoRA freeze lora_A, LoRA-XS both.
_ON_PURPOSE = r"freez|frozen|lora[-_ ]?fa\b|ffa[-_ ]?lora|lora[-_ ]?xs|rolora|alternat|asymmetr"
_OPTIMIZER_NAMES = ("optim", "optimizer", "optim_type", "optimizer_type", "optimizer_name")


def only_decayed(evidence: Evidence) -> Verdicts:
    """Every element multiplied by one factor below 1: weight decay without a gradient."""
    change = evidence.change
    if change is None:
        return
    able = [m for m in change.modules if len(_factors(m)) == 2]
    decayed = [m for m in able if all(shrunk_to(t) is not None for t in _factors(m))]
    factors = [c for m in decayed for t in _factors(m) if (c := shrunk_to(t)) is not None]
    if not decayed or max(factors) - min(factors) > _APART * (1 - statistics.median(factors)):
        return
    whole = len(decayed) == len(able)
    if not whole and all(m.place.optional for m in decayed):
        return  # experts without tokens
    factor = statistics.median(factors)
    yield Finding(
        id="only-decayed",
        severity=Severity.ERROR if whole else Severity.WARNING,
        statement=(
            f"all of lora_A and lora_B is {factor:.6g} times what it was: no gradient reached the adapter"
            if whole
            else f"{len(decayed)} of {len(able)} modules are {factor:.6g} times what they were, without gradient"
        ),
        evidence=(
            f"{len(factors)} tensors, factors from {min(factors):.6g} to {max(factors):.6g}",
            *(shown(m.place.module) for m in decayed[: 0 if whole else _SHOWN]),
        ),
        cause="weight decay alone moves them: (1 - rate * decay) a step; the loss does not depend on them",
        next_step="check that the loss has a gradient, and that the step runs with the adapter enabled",
        data={"factor": factor, "modules": len(decayed)},
    )


def factor_untouched(evidence: Evidence) -> Verdicts:
    """One of lora_A and lora_B as it was in modules whose other factor was trained."""
    change = evidence.change
    if change is None:
        return
    for part, other in (("B", "A"), ("A", "B")):
        left = [m for m in change.modules if _left_alone(change, m, part, other)]
        if not left:
            continue
        of = sum(len(_factors(m)) == 2 for m in change.modules)
        # Optimizers that freeze lora_A are in use; where nothing names the optimizer, this may be one of them.
        purpose = evidence.settings.says(_ON_PURPOSE)
        known = part == "B" or len(left) < of or bool(evidence.settings.words(*_OPTIMIZER_NAMES))
        yield Finding(
            id="factor-untouched",
            severity=Severity.WARNING if known and not purpose else Severity.NOTE,
            statement=f"lora_{part} was not trained in {len(left)} of {of} modules, while their lora_{other} was",
            evidence=(
                f"each lora_{part} is not zero and "
                + ("bit-identical" if not any(_factor(m, part).moved for m in left) else "only decayed"),
                f"lora_{other} moved by up to {max(_factor(m, other).max_abs_delta or 0.0 for m in left):.3g}",
                *(shown(_factor(m, part).key) for m in left[:_SHOWN]),
            ),
            cause=(
                "the run's files speak of frozen parameters"
                if purpose
                else f"lora_{part} is missing from the optimizer (a filter by name), or frozen"
            ),
            next_step="compare the optimizer's parameters with the adapter's",
            data={"part": part, "modules": len(left)},
        )


def shrunk_to(tensor: TensorChange) -> float | None:
    """c < 1 where a tensor after the run is c times what it was, in all its elements; else None."""
    was, now, moved = tensor.norm_before, tensor.norm_after, tensor.norm_delta
    if not was or not now or not moved or not _LOST * was < now < was or tensor.numel < _FEWEST_ELEMENTS:
        return None
    if tensor.nonfinite_before or tensor.nonfinite_after:
        return None
    along = (was**2 + now**2 - moved**2) / (2 * now)  # of the tensor before, in the direction of the one after
    aside = max(was**2 - along**2, 0.0) ** 0.5
    return now / was if along > 0 and aside <= _ASIDE * moved else None


def _left_alone(change: AdapterChange, module: ModuleChange, part: str, other: str) -> bool:
    """Whether a factor that had a gradient (the other is not zero) stayed, where training would have shown."""
    if len(_factors(module)) != 2 or module.place.tower or _factor(module, part).numel < _FEWEST_ELEMENTS:
        return False
    kept, trained = _factor(module, part), _factor(module, other)
    if kept.changed is None or trained.changed is None or not kept.norm_before or not trained.norm_before:
        return False
    if (kept.moved and shrunk_to(kept) is None) or not trained.moved or shrunk_to(trained) is not None:
        return False
    spacing = SPACING.get(change.after.tensors[kept.key].dtype, 1.0)
    # A factor's gradient is in proportion to the other factor, which plain SGD passes on and Adam does not.
    slope = min(1.0, trained.norm_before / kept.norm_before)
    return (trained.max_abs_delta or 0.0) * slope > _SEEN * spacing * kept.max_abs_after


def _factors(module: ModuleChange) -> Sequence[TensorChange]:
    return [t for t in module.tensors if t.place.part in ("A", "B") and not t.place.frozen]


def _factor(module: ModuleChange, part: str) -> TensorChange:
    return next(t for t in _factors(module) if t.place.part == part)


CHECKS = (
    Check("only-decayed", "an adapter that weight decay alone has changed", only_decayed),
    Check("factor-untouched", "lora_A or lora_B untouched beside a trained neighbour", factor_untouched),
)
