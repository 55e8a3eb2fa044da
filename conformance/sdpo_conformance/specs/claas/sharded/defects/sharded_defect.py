"""What a catalogued sharded defect is: words for people, the parts it replaces, the mesh that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import ShardedParts

LOSSES = (Capability.LOSS, Capability.FUSED)


@dataclass(frozen=True)
class ShardedDefect:
    """``violates``: rule ids, the first of which has to catch it. ``mesh``: where it shows. ``seen``: public reports,
    as repository#number. ``parts`` replaced in ``ShardedParts``."""

    name: str
    sentence: str
    violates: tuple[str, ...]
    parts: Mapping[str, Any] = field(repr=False)
    mesh: str = "tp=2"
    seen: tuple[str, ...] = ()
    capabilities: tuple[Capability, ...] = LOSSES

    def implementation(self) -> SimpleNamespace:
        """The executable form: an object with the attributes of ``capabilities``."""
        parts = replace(ShardedParts(), **self.parts)
        return SimpleNamespace(**{entry.value: getattr(parts, entry.value) for entry in self.capabilities})
