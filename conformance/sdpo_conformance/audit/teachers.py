"""The averaged teachers that a run saves beside its actor, checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sdpo_conformance.audit.adapter import Adapter, open_adapter
from sdpo_conformance.audit.adapter_change import AdapterChange, compare_adapters
from sdpo_conformance.audit.checkpoints import content_mark, folder_of, holds_weights, name_of
from sdpo_conformance.audit.errors import AuditError

_NAMES = ("teacher", "ema_teacher", "teacher_ema", "self_teacher", "ema")
_INSIDE = ("", "lora_adapter", "adapter")


@dataclass(frozen=True)
class FrozenTeacher:
    """Two neighbouring checkpoints whose teachers hold equal tensors. `actor` is what the actor did between them,
    `gap` how far the teacher is from the later actor.
    """

    first: str
    second: str
    actor: AdapterChange
    gap: AdapterChange


@dataclass(frozen=True)
class Teachers:
    """`count`: checkpoints with a teacher. `followers`: those whose teacher is the actor to the last bit."""

    count: int = 0
    frozen: FrozenTeacher | None = None
    followers: tuple[str, ...] = ()
    actor_moved: bool = False


def find_teachers(checkpoints: Sequence[Path]) -> Teachers:
    """Compare the teachers of a run's checkpoints with one another and with the actors beside them; what cannot be read
    is no teacher.
    """
    try:
        return _compared(checkpoints)
    except AuditError:
        return Teachers()


def _compared(checkpoints: Sequence[Path]) -> Teachers:
    pairs: list[tuple[str, Adapter, Adapter]] = []
    for checkpoint in checkpoints:
        place = _teacher_beside(checkpoint)
        pairs += [(name_of(checkpoint), open_adapter(checkpoint), open_adapter(place))] if place else []
    marks = [(content_mark(actor), content_mark(teacher)) for _, actor, teacher in pairs]
    if len(pairs) < 2:
        return Teachers(len(pairs))
    followers = tuple(name for (name, _, _), (actor, teacher) in zip(pairs, marks, strict=True) if actor == teacher)
    frozen = None
    for (one, two), (mark_one, mark_two) in zip(pairwise(pairs), pairwise(marks), strict=True):
        if mark_one[1] == mark_two[1] and mark_one[0] != mark_two[0]:
            actor, gap = compare_adapters(one[1], two[1]), compare_adapters(two[2], two[1])
            frozen = FrozenTeacher(one[0], two[0], actor, gap)
            break
    return Teachers(len(pairs), frozen, followers, len({actor for actor, _ in marks}) == len(marks))


def _teacher_beside(checkpoint: Path) -> Path | None:
    folder = folder_of(checkpoint)
    places = [folder / name / inner for name in _NAMES for inner in _INSIDE]
    return next((place for place in places if place != checkpoint and holds_weights(place)), None)
