"""A requirement that is judged on the ranks of a mesh."""

from __future__ import annotations

from dataclasses import dataclass

from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.specs.requirement import Requirement


@dataclass(frozen=True)
class ShardedRule(Requirement):
    """A requirement on a mesh. ``axes``: it is judged where one of these really cuts something. ``rests_on``: rules
    whose failure this one's may follow from."""

    axes: tuple[str, ...] = ()
    rests_on: tuple[str, ...] = ()

    def applies(self, mesh: MeshShape) -> bool:
        return bool(mesh.shared & set(self.axes))
