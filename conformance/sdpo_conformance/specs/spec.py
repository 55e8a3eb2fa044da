"""A spec as one value: everything that differs between specs is reached through it.

``Spec`` is light: its folder's ``__init__`` builds it without torch, for ``list`` and ``--help``. ``Parts`` is what a
run needs of it: inputs, truth and bounds, words, catalogue; each spec's ``parts`` module builds that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from hypothesis.strategies import SearchStrategy

    from sdpo_conformance.cases.case import Case
    from sdpo_conformance.inputs.choices import Source
    from sdpo_conformance.judging.examples import Subject
    from sdpo_conformance.judging.expectation import Expectations
    from sdpo_conformance.judging.profiles import Profile
    from sdpo_conformance.protocol import Capability, FusedSDPOLossInput
    from sdpo_conformance.sharded.mesh import MeshShape
    from sdpo_conformance.sharded.pool import Pool
    from sdpo_conformance.sharded.rule_on_ranks import ShardedRule
    from sdpo_conformance.specs.requirement import Requirement
    from sdpo_conformance.trainer.observation import Observation


@dataclass(frozen=True)
class OnRanks:
    """What ``run --mesh`` asks of a spec that has requirements on ranks.

    ``families``: prefix -> words, in the order of the report; ``selected``: (mesh, ids or families) -> its rules there,
    raises ValueError for a name that is none; ``subject``: (pool, entry, profile, seed) -> what a rule's check is
    handed; ``try_dtype``: call that subject in a dtype, raises ImplementationError; ``describe``: a case and its cut in
    words; ``write_program``: (folder, name, subject, rule, failure, case) -> the name of a program that shows it.
    """

    families: Mapping[str, str]
    selected: Callable[[MeshShape, tuple[str, ...]], Sequence[ShardedRule]]
    subject: Callable[[Pool, Capability, Profile, int], Subject]
    try_dtype: Callable[[Subject, str], None]
    describe: Callable[[Any], str]
    write_program: Callable[[Path, str, Any, ShardedRule, Mapping[str, Any], Any], str]


@dataclass(frozen=True)
class TokensTruth:
    """The truth about the loss of some tokens, and what plain PyTorch makes of it.

    ``loss``, and its ``gradient`` to the logits (1, S, V) float64 on the CPU; ``scale``: the sum of the tokens'
    absolute terms; ``eager_loss``, ``eager_gradient`` to the hidden states (1, S, H): plain PyTorch's;
    ``eager_error``: how far that loss is off, token by token, in units of ``scale``.
    """

    loss: float
    gradient: torch.Tensor
    scale: float
    eager_loss: float
    eager_gradient: torch.Tensor
    eager_error: float


@dataclass(frozen=True)
class Timed:
    """What the bench asks of the spec whose loss it times.

    ``truth``: (logits in float64, input, on-policy or as drawn) -> the truth about its tokens; ``recorded``: (entry,
    dtype) -> recorded cases of one shape; ``first_finding``: what a trainer did wrong, in one line, or empty.
    """

    truth: Callable[[torch.Tensor, FusedSDPOLossInput, bool], TokensTruth]
    recorded: Callable[[Capability, torch.dtype], Sequence[Any]]
    first_finding: Callable[[Observation], str]


@dataclass(frozen=True)
class Intermediates:
    """The truth about a case, for a person to read beside what came back. ``per_token``: words -> (B, T);
    ``returned``: the results, and gradients as ``gradient.FIELD``, by the name under which they are kept."""

    per_token: Mapping[str, torch.Tensor] = field(default_factory=dict)
    returned: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a run asks of a spec.

    ``visits``: a corner once for each kind of each of its fields, costly ones included or not; ``build``: the case that
    a source chooses within a corner; ``strategy``: Hypothesis's choice of such cases; ``recorded``: the recorded cases
    within a corner, for an entry, in the widest of the dtypes; ``expectations``: truth and bounds of an entry on a
    case; ``load``: what ``Case.save`` wrote; ``describe``: a case in words; ``ordinary``: one small ordinary case in a
    dtype, for asking whether the dtype is taken; ``defect``: the executable form of a catalogued defect by name, raises
    KeyError; ``diagnose``: (run folder, failed records, offered entries) -> lines, matches, usable_for; ``asked_next``:
    (run folder, a first failed record) -> requirements that may name its cause better than its own;
    ``on_ranks``: what ``run --mesh`` asks, None where no requirement is about ranks; ``timed``: what the bench asks,
    None where it times no loss of this spec; ``intermediates``: the truth about a case, step by step.
    """

    visits: Callable[[Any, bool], Sequence[Any]]
    build: Callable[[Source, Any, Any, Sequence[torch.dtype], Any], Any]
    strategy: Callable[[Any, Any, Sequence[torch.dtype], Any], SearchStrategy[Any]]
    recorded: Callable[[Any, Any, Sequence[torch.dtype]], Iterator[Any]]
    expectations: Callable[[Any, Any], Expectations]
    load: Callable[[Path], Case]
    describe: Callable[[Any], str]
    ordinary: Callable[[str, Any], Case]
    defect: Callable[[str], Any]
    diagnose: Callable[[Path, Sequence[Any], Sequence[Any]], Mapping[str, Any] | None]
    asked_next: Callable[[Path, Any], Sequence[str]] = lambda folder, failed: ()
    on_ranks: Callable[[], OnRanks] | None = None
    timed: Callable[[], Timed] | None = None
    intermediates: Callable[[Any], Intermediates] = lambda case: Intermediates()


@dataclass(frozen=True)
class Spec:
    """``name`` as ``--spec`` takes it; ``title`` and ``version`` as a verdict names it; ``source``: whose code, at
    which revision; ``package``: where its modules are; ``families``: prefix of a requirement id -> words, in the order
    of the report; ``entries``: the attributes that it judges; ``own_entries``: families tested through an entry of
    their own, by its attribute; ``sweeps``: requirements that visit every corner at once: what they find, a rule of its
    own names better; ``bundled``: names of ``--impl`` that mean another module
    here; ``dtypes``: those asked for where an implementation says nothing; ``audit_rules``: for a finding of the audit,
    by its id, the requirements that judge the code that is its likely cause."""

    name: str
    version: str
    title: str
    source: str
    package: str
    families: Mapping[str, str]
    entries: tuple[str, ...]
    own_entries: Mapping[str, str] = field(default_factory=dict)
    sweeps: tuple[str, ...] = ()
    bundled: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    audit_rules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``CLaaS 1.0``."""
        return f"{self.title} {self.version}"

    @property
    def rules(self) -> str:
        """The package that pytest collects."""
        return f"{self.package}.rules"

    @property
    def parts(self) -> Parts:
        """What a run asks of it; imports torch."""
        found: Parts = importlib.import_module(f"{self.package}.parts").PARTS
        return found

    def requirements(self) -> Mapping[str, Requirement]:
        """Every requirement by id, in the order of the spec; imports its rules."""
        from sdpo_conformance.specs.requirement import registered

        return registered(self.rules, tuple(self.families))
