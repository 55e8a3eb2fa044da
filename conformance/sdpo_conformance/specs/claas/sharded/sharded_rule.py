"""The sharded requirements: ids, levels, statements, the public reports behind them, and the axes they need."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from sdpo_conformance.protocol import Capability
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.sharded.rule_on_ranks import ShardedRule
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject
from sdpo_conformance.specs.requirement import Level

SHARDED_FAMILIES: Mapping[str, str] = {
    "VP": "vocabulary cut (tp)",
    "DP": "batch cut (dp)",
    "CP": "sequence cut (cp)",
    "MESH": "every mesh",
}
"""Family prefix -> the words a report uses, in the order of the report."""


_RULES: dict[str, ShardedRule] = {}


def sharded_rule(
    id: str,
    level: Level,
    statement: str,
    *,
    source: str,
    why: str,
    capabilities: tuple[Capability, ...],
    axes: tuple[str, ...],
    rests_on: tuple[str, ...] = (),
) -> Callable[[Callable[[ShardedSubject], None]], Callable[[ShardedSubject], None]]:
    """Register the decorated check. ``source``: the public reports that the rule comes from."""

    def decorate(check: Callable[[ShardedSubject], None]) -> Callable[[ShardedSubject], None]:
        if id in _RULES:
            raise ValueError(f"sharded rule {id} is defined twice")
        _RULES[id] = ShardedRule(id, level, statement, source, why, capabilities, check, axes, rests_on)
        return check

    return decorate


def sharded_rules() -> Mapping[str, ShardedRule]:
    """Every sharded rule, in the order of the families."""
    importlib.import_module("sdpo_conformance.specs.claas.sharded.rules")
    order = list(SHARDED_FAMILIES)
    return dict(sorted(_RULES.items(), key=lambda item: (order.index(item[1].family), item[1].number)))


def selected_rules(mesh: MeshShape, only: tuple[str, ...]) -> list[ShardedRule]:
    """The rules that apply to ``mesh``, less those that ``only`` (ids or families) leaves out; raises ValueError for a
    name that is none."""
    known = sharded_rules()
    wanted = {name.strip().upper() for name in only}
    for name in wanted:
        if name not in SHARDED_FAMILIES and name not in known:
            families = ", ".join(SHARDED_FAMILIES)
            raise ValueError(f"no sharded requirement or family {name!r}; families: {families}; ids look like VP-1")
    return [
        rule
        for rule in known.values()
        if rule.applies(mesh) and (not wanted or rule.id in wanted or rule.family in wanted)
    ]
