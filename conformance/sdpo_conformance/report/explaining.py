"""``explain``: a requirement in full."""

from __future__ import annotations

from rich.text import Text

from sdpo_conformance.specs.requirement import Requirement, selected
from sdpo_conformance.specs.spec import Spec


def explanations(name: str, spec: Spec) -> list[Text]:
    """The requirement of that id, or all of that family; raises ValueError for an unknown name."""
    known = spec.requirements()
    ids = selected(known, (name,))
    return [explanation(entry, spec) for id, entry in known.items() if id in ids]


def explanation(requirement: Requirement, spec: Spec) -> Text:
    """Id, level, statement, reason, source, entries, and how to run it alone."""
    entries = ", ".join(capability.value for capability in requirement.capabilities)
    return Text.assemble(
        (f"{requirement.id} ({requirement.level}, {spec.families[requirement.family]})", "bold"),
        f"\n  rule     {requirement.statement}",
        f"\n  why      {requirement.why}",
        f"\n  source   {requirement.source}",
        f"\n  tested   through {entries}",
        f"\n  alone    sdpo-conformance run IMPL --only {requirement.id}",
    )
