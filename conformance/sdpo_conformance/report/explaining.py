"""``explain``: a requirement, a family, a catalogued defect, an entry, a spec, a status or a level, in full."""

from __future__ import annotations

import difflib
import re
import textwrap
from contextlib import suppress

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdpo_conformance.protocol import ENTRIES
from sdpo_conformance.specs import specs
from sdpo_conformance.specs.rule_index import (
    CataloguedDefect,
    Rule,
    computed_defects,
    defect_index,
    part_source,
    rule_index,
)
from sdpo_conformance.specs.spec import Spec

WORDS = {
    "passed": "Every example met the rule.",
    "failed": "An example broke the rule; the report shows the smallest that was found.",
    "expected failure": "It failed, and SDPO_CLAIMS or --xfails says that it does, with the reason.",
    "unexpected pass": "It passed although SDPO_CLAIMS or --xfails expects a failure: exit status 1; remove the "
    "expectation.",
    "not judged": "It could not be judged here; the reason is beside it.",
    "internal error": "The suite itself failed; nothing is said about the implementation. Please report it.",
    "MUST": "A rule that decides about conforming; the published code itself meets every one.",
    "SHOULD": "A rule that is judged and reported, and decides nothing: published code, or plain PyTorch, may miss it.",
}
"""Statuses and levels, as reports print them."""


def explanations(name: str, spec: Spec) -> list[RenderableType]:
    """What ``name`` means, in ``spec`` or in the one whose rule or defect it names; raises ValueError for an unknown
    one, with what is near it."""
    try:
        return explained_by(name, spec)
    except ValueError as unknown:
        for other in specs():
            if other.name != spec.name and (sounds_like(name, other) or is_catalogued(name, other)):
                with suppress(ValueError):
                    return explained_by(name, other)
        raise unknown from None


def is_catalogued(name: str, spec: Spec) -> bool:
    """Whether a defect of ``spec`` bears this name; what is computed is not looked at."""
    return name.strip().removeprefix("defect:") in {defect.name for defect in defect_index(spec)}


def sounds_like(name: str, spec: Spec) -> bool:
    """Whether an id or a defect's name begins as those of ``spec`` do; nothing is imported for it."""
    wanted = name.strip()
    prefixes = {f"{family}-" for family in spec.families}
    return (
        wanted.upper() in spec.families
        or wanted.removeprefix("defect:").startswith(f"{spec.name}-")
        or any(wanted.upper().startswith(prefix) for prefix in prefixes)
    )


def explained_by(name: str, spec: Spec) -> list[RenderableType]:
    """What ``name`` means in ``spec``; raises ValueError for an unknown one."""
    wanted = name.strip()
    rules = [rule for rule in rule_index(spec) if wanted.upper() in (rule.id, rule.family)]
    if not rules:
        rules = [rule for rule in rule_index(spec) if spec.families[rule.family].lower() == wanted.lower()]
    if rules:
        return [explained_rule(rule, spec, alone=len(rules) == 1) for rule in rules]
    defects = {defect.name: defect for defect in defect_index(spec)}
    parts = wanted.removeprefix("defect:").split("+")
    if all(part in defects for part in parts):
        return [explained_defect(defects[part], spec) for part in parts]
    for one in specs():
        if wanted in (one.name, one.title):
            return [explained_spec(one)]
    for entry, row in ENTRIES.items():
        if wanted in (entry.value, row.label, row.column):
            head = Text(f"{entry.value} ({row.label})", style="bold")
            call = table_of([("called", f"{entry.value}{row.signature}")])
            return [Group(head, Padding(call, (0, 0, 0, 2)))]
    for word in (wanted.lower(), wanted.upper()):
        if word in WORDS:
            return [Group(Text(word, style="bold"), Padding(Text(WORDS[word]), (0, 0, 0, 2)))]
    defects |= {defect.name: defect for defect in computed_defects(spec)}
    if all(part in defects for part in parts):
        return [explained_defect(defects[part], spec) for part in parts]
    known = [rule.id for rule in rule_index(spec)] + list(defects) + [entry.value for entry in ENTRIES]
    near = difflib.get_close_matches(wanted.upper(), known, n=2) or difflib.get_close_matches(wanted, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"nothing is called {name!r} in {spec.label}{hint}; sdpo-conformance list requirements | defects")


def explained_spec(spec: Spec) -> RenderableType:
    """Name and version, whose code it was read from, its entries, how to judge by it."""
    lines = [
        ("source", spec.source),
        ("entries", ", ".join(spec.entries)),
        ("judge", f"sdpo-conformance check IMPL --spec {spec.name}"),
    ]
    return Group(Text(f"{spec.name} ({spec.label})", style="bold"), Padding(table_of(lines), (0, 0, 0, 2)))


def explained_rule(rule: Rule, spec: Spec, alone: bool) -> RenderableType:
    """Id, level, statement, reason, source, entries, how to run it alone; alone also the defects that break it and the
    wrong and right lines of the first."""
    lines = [
        ("rule", rule.statement),
        ("why", rule.why),
        ("source", rule.source),
        ("tested", f"through {', '.join(rule.entries)}"),
        ("alone", f"sdpo-conformance run IMPL --only {rule.id}"),
    ]
    broken = [defect for defect in defect_index(spec) if defect.violates and defect.violates[0] == rule.id]
    if alone and broken:
        names = [defect.name for defect in broken]
        lines.append(("broken by", ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")))
    head = Text(f"{rule.id} ({rule.level}, {spec.families[rule.family]})", style="bold")
    beside = [defect for defect in broken if any(right for _, _, right in lines_of(defect, spec))]
    shown = next(iter([*beside, *broken]), None) if alone else None
    return Group(head, Padding(table_of(lines), (0, 0, 0, 2)), *(side_by_side(shown, spec) if shown else []))


def explained_defect(defect: CataloguedDefect, spec: Spec) -> RenderableType:
    """What is wrong, the fix, the rules it breaks, what it may still be used for, wrong and right lines."""
    lines = [
        ("wrong", defect.sentence),
        ("fix", defect.fix),
        ("breaks", ", ".join(defect.violates)),
        ("usable for", defect.usable_for or "nothing"),
        ("try it", f"sdpo-conformance check defect:{defect.name}"),
    ]
    return Group(Text(defect.name, style="bold"), Padding(table_of(lines), (0, 0, 0, 2)), *side_by_side(defect, spec))


def table_of(lines: list[tuple[str, str]], width: int = 10) -> Table:
    """Words with a hanging indent, behind names of this width."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=width, overflow="fold")
    table.add_column(overflow="fold")
    for head, words in lines:
        table.add_row(Text(head), Text(words))
    return table


def lines_of(defect: CataloguedDefect, spec: Spec) -> list[tuple[str, str, str]]:
    """(part, wrong, right) for every part that the defect replaces; right is empty where the right loss has no such
    part."""
    return [(part, wrong, part_source(spec, part)) for part, wrong in defect.changes.items()]


def side_by_side(defect: CataloguedDefect, spec: Spec) -> list[RenderableType]:
    """The wrong lines beside the right ones, or alone where the right loss has none in their place."""
    pairs = lines_of(defect, spec)
    if not pairs:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(f"  wrong ({defect.name})", overflow="fold", ratio=1)
    beside = any(right for _, _, right in pairs)
    if beside:
        table.add_column("right", overflow="fold", ratio=1)
    for _, wrong, right in pairs:
        columns = [textwrap.indent(without_docstring(wrong), "  "), *([without_docstring(right)] if beside else [])]
        table.add_row(*(Text(column) for column in columns))
    return [table]


DOCSTRING = re.compile(r'^[ ]*""".*?"""[ ]*\n?', re.MULTILINE | re.DOTALL)


def without_docstring(source: str) -> str:
    """The source as it stands, dedented, less its docstrings."""
    return DOCSTRING.sub("", textwrap.dedent(source)).strip("\n")
