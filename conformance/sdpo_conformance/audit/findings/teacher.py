"""Whether an averaged self-teacher follows its student, and only slowly."""

from __future__ import annotations

from sdpo_conformance.audit.adapter_change import AdapterChange
from sdpo_conformance.audit.declared import Declared
from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, Severity, Verdicts
from sdpo_conformance.audit.header import SPACING

_RATES = ("teacher_update_rate", "teacher_ema_rate", "ema_teacher_rate")
_DECAYS = ("teacher_ema_decay", "ema_teacher_decay", "teacher_decay")
#: Settings by which a teacher is updated now and then, or later.
_SELDOM = r"(teacher|ema).*(interval|freq|every|steps|period|warmup|start|delay)|(interval|freq|every).*(teacher|ema)"
#: How many times a dtype's spacing a move has to be in order to be seen.
_SEEN = 4.0
#: From this rate on an average of the actor is the actor itself soon after the actor has come to rest.
_FAST = 0.5


def teacher_frozen(evidence: Evidence) -> Verdicts:
    """A teacher that stays as it is while its student moves, although the settings give it a rate."""
    rate, frozen = _rate(evidence.settings), evidence.teachers.frozen
    if rate is None or frozen is None or not frozen.actor.matters or not _visible(frozen.gap, rate):
        return
    yield Finding(
        id="teacher-frozen",
        severity=Severity.ERROR,
        statement=f"the teacher was never updated from {frozen.first} to {frozen.second}, while the actor moved",
        evidence=(
            f"teacher: equal tensors; actor: moved by up to {frozen.actor.max_abs_delta:.3g}",
            f"the settings average it at a rate of {rate:g}; it is {frozen.gap.max_abs_delta:.3g} off the actor",
        ),
        cause="the average is never taken, of another copy of the weights, or what is saved is not what was averaged",
        next_step="compare the teacher's weights before and after one update",
        data={"rate": rate, "actor_moved": frozen.actor.max_abs_delta},
    )


def teacher_is_the_actor(evidence: Evidence) -> Verdicts:
    """A teacher that is its student to the last bit, although it should lag behind."""
    rate, found = _rate(evidence.settings), evidence.teachers
    if rate is None or rate > _FAST or not found.actor_moved or len(found.followers) < max(2, found.count):
        return
    yield Finding(
        id="teacher-is-actor",
        severity=Severity.ERROR,
        statement=f"the teacher is the actor to the last bit in all {found.count} checkpoints that hold both",
        evidence=(f"an average of rate {rate:g} lags behind; the actor moved from each checkpoint to the next",),
        cause="teacher and actor share their weights, or the teacher was saved from the actor",
        next_step="compare the two right after an update: they have to differ",
        data={"rate": rate, "checkpoints": found.count},
    )


def _rate(settings: Declared) -> float | None:
    """The rate at which the settings say that the teacher is averaged after every step; None where they do not."""
    decay = settings.number(*_DECAYS)
    rate = settings.number(*_RATES) if decay is None else 1 - decay
    kinds = settings.words("teacher_regularization")
    if rate is None or not 0 < rate < 1 or (kinds and kinds != {"ema"}) or settings.given(_SELDOM):
        return None
    return rate


def _visible(gap: AdapterChange, rate: float) -> bool:
    """Whether one update alone would move an element of the teacher by more than its dtype's spacing."""
    return any(
        rate * (tensor.max_abs_delta or 0.0)
        > _SEEN * SPACING.get(gap.after.tensors[tensor.key].dtype, 1.0) * tensor.max_abs_after
        for tensor in gap.compared
    )


CHECKS = (
    Check("teacher-frozen", "a teacher that its average never moves", teacher_frozen),
    Check("teacher-is-actor", "a teacher that is its student", teacher_is_the_actor),
)
