"""What a run on a mesh asks of the CLaaS spec."""

from __future__ import annotations

from typing import Any

from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.judging.profiles import Profile
from sdpo_conformance.protocol import Capability
from sdpo_conformance.sharded.pool import Pool
from sdpo_conformance.specs.claas.loss_case import ordinary_case
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase
from sdpo_conformance.specs.claas.sharded.draw import PLAIN, laid
from sdpo_conformance.specs.claas.sharded.sharded_program import write_program
from sdpo_conformance.specs.claas.sharded.sharded_rule import SHARDED_FAMILIES, selected_rules
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject
from sdpo_conformance.specs.claas.words import describe
from sdpo_conformance.specs.spec import OnRanks


def subject_on(pool: Pool, entry: Capability, profile: Profile, seed: int) -> ShardedSubject:
    """An entry of the implementation that the pool's ranks hold."""
    return ShardedSubject(
        implementation=None, entry=entry, claims=pool.ready.claims, profile=profile, seed=seed, device=pool.device,
        scratch=None, pool=pool,
    )  # fmt: skip


def try_dtype(subject: Any, dtype: str) -> None:
    """Call a loss on an ordinary case in a dtype; raises ImplementationError where it does not take it. The heads take
    what the losses take."""
    if subject.entry in (Capability.LOSS, Capability.FUSED):
        subject.answers(laid(SeededSource("dtype"), ordinary_case(dtype, subject.entry), subject.mesh, PLAIN))


def in_words(case: ShardedCase) -> str:
    """The case, and how it is cut."""
    return f"{describe(case)}, {case.laid.words()}"


ON_RANKS = OnRanks(
    families=SHARDED_FAMILIES,
    selected=selected_rules,
    subject=subject_on,
    try_dtype=try_dtype,
    describe=in_words,
    write_program=write_program,
)
