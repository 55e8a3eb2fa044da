"""The words of a spec's rules and of its catalogue, read from their source: ``list`` and ``explain`` need no torch.

A rule is ``@requirement(ID, LEVEL, STATEMENT, source=..., why=..., capabilities=...)``, a defect is a call with
``name``, ``sentence``, ``violates`` and ``fix``. What is not written out as text is left to the import.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from sdpo_conformance.files import write_json
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.spec import Spec

POSITIONS = ("id", "level", "statement", "source", "why", "capabilities")


class NotWrittenOut(Exception):
    """The value is computed, not written."""


@dataclass(frozen=True)
class Rule:
    """The words of one requirement; ``entries``: the attributes it is tested through."""

    id: str
    level: str
    statement: str
    source: str
    why: str
    entries: tuple[str, ...]

    @property
    def family(self) -> str:
        return self.id.rsplit("-", 1)[0]


@dataclass(frozen=True)
class CataloguedDefect:
    """The words of one catalogued defect; ``changes``: part -> the expression that takes its place."""

    name: str
    sentence: str
    violates: tuple[str, ...]
    fix: str
    usable_for: str
    module: str
    changes: Mapping[str, str]


Entry = TypeVar("Entry", Rule, CataloguedDefect)


def kept(name: str, kind: Callable[..., Entry], read: Callable[[], tuple[Entry, ...]]) -> tuple[Entry, ...]:
    """What ``read`` finds, kept beside the bytecode for as long as no source changes: reading it all takes longer than
    the rest of ``explain``."""
    path = Path(__file__).parent / "__pycache__" / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["sources"] == sources():
            return tuple(
                kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in one.items()})
                for one in known["entries"]
            )
    found = read()
    if not sys.dont_write_bytecode:
        with suppress(OSError):
            write_json(path, {"sources": sources(), "entries": [asdict(one) for one in found]})
    return found


@cache
def sources() -> list[int]:
    """Number, size and latest change of this package's source files."""
    files = [path.stat() for path in Path(__file__).parents[1].rglob("*.py")]
    return [len(files), sum(file.st_size for file in files), max(file.st_mtime_ns for file in files)]


def rule_index(spec: Spec) -> tuple[Rule, ...]:
    """Every rule of ``spec``, in the order of its families; imports the rules where their words are computed."""
    return _rules(spec.name)


@lru_cache
def _rules(name: str) -> tuple[Rule, ...]:
    return kept(f"rules.{name}", Rule, lambda: read_rules(find_spec(name)))


def read_rules(spec: Spec) -> tuple[Rule, ...]:
    """Every rule of ``spec``, read from its source."""
    try:
        found = [rule for path in modules(spec.rules, "test_*.py") for rule in rules_of(path)]
        if not found:
            raise NotWrittenOut(spec.rules)
    except NotWrittenOut:
        found = [
            Rule(one.id, one.level.value, one.statement, one.source, one.why, tuple(c.value for c in one.capabilities))
            for one in spec.requirements().values()
        ]
    order = list(spec.families)
    return tuple(sorted(found, key=lambda rule: (order.index(rule.family), int(rule.id.rsplit("-", 1)[1]))))


def defect_index(spec: Spec) -> tuple[CataloguedDefect, ...]:
    """The catalogue of ``spec``, in the order of its modules."""
    return _defects(spec.package)


@lru_cache
def _defects(package: str) -> tuple[CataloguedDefect, ...]:
    return kept(f"defects.{package}", CataloguedDefect, lambda: read_defects(package))


def computed_defects(spec: Spec) -> tuple[CataloguedDefect, ...]:
    """The rest of the catalogue: names and words that are computed. Importing it takes seconds, once for as long as no
    source changes."""
    return _computed(spec.name)


@lru_cache
def _computed(name: str) -> tuple[CataloguedDefect, ...]:
    spec = find_spec(name)
    read = {one.name for one in defect_index(spec)}

    def rest() -> tuple[CataloguedDefect, ...]:
        return tuple(one for one in _imported_defects(spec.package) if one.name not in read)

    return kept(f"computed.{spec.package}", CataloguedDefect, rest)


def read_defects(package: str) -> tuple[CataloguedDefect, ...]:
    """The catalogue of a spec's package, read from its source."""
    found = tuple(defect for path in modules(f"{package}.defects", "*.py") for defect in defects_of(path))
    return found or tuple(_imported_defects(package))


def _imported_defects(package: str) -> Iterator[CataloguedDefect]:
    """The catalogue of a spec whose entries are made by functions: it has to be imported."""
    module = importlib.import_module(f"{package}.defects")
    for one in (*module.catalogue().values(), *getattr(module, "DIALECTS", ()), *getattr(module, "TEACHERS", ())):
        yield CataloguedDefect(one.name, one.sentence, one.violates, one.fix, one.usable_for, "defects", {})


def modules(package: str, pattern: str) -> list[Path]:
    """The source files of a package, without importing it."""
    root = Path(__file__).parents[1].joinpath(*package.split(".")[1:])
    return sorted(root.glob(pattern))


def rules_of(path: Path) -> Iterator[Rule]:
    """The rules that one module states."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = constants(tree)
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in function.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "requirement":
                named = {word.arg: word.value for word in call.keywords if word.arg}
                given = dict(zip(POSITIONS, call.args, strict=False))
                read = {key: value_of(node, names) for key, node in {**given, **named}.items()}
                yield Rule(
                    read["id"], str(read["level"]), read["statement"], read["source"], read["why"],
                    tuple(str(entry) for entry in read["capabilities"]),
                )  # fmt: skip


def defects_of(path: Path) -> Iterator[CataloguedDefect]:
    """The defects that one module writes out, by keyword or, as step loops are, by position."""
    text = path.read_text(encoding="utf-8")
    if "DEFECTS" not in text and "DIALECTS" not in text:
        return
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    names = constants(tree)
    functions = {**imported_functions(path, tree), **functions_of(tree, lines)}
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        named = {word.arg: word.value for word in call.keywords if word.arg}
        positions = ("name", "sentence", "violates", "fix", "change", "seen", "usable_for")
        given = {**dict(zip(positions, call.args, strict=False)), **named}
        if not {"name", "sentence", "violates", "fix"} <= set(given):
            continue
        try:
            name, sentence, violates, fix = (value_of(given[key], names) for key in positions[:4])
        except NotWrittenOut:
            continue
        usable: Any = ""
        with suppress(NotWrittenOut):  # a helper has something else in that place
            usable = value_of(given["usable_for"], names) if "usable_for" in given else ""
        if isinstance(name, str) and isinstance(violates, tuple):
            change = given.get("change")
            if isinstance(change, ast.Constant):  # the words of a number: its parts come after them
                change = call
            changes = changes_of(change, lines, functions) if change is not None else {}
            usable_for = usable if isinstance(usable, str) else ""
            yield CataloguedDefect(name, sentence, violates, fix, usable_for, path.stem, changes)


def functions_of(tree: ast.Module, lines: list[str]) -> dict[str, str]:
    """The source of a module's functions by name."""
    return {one.name: segment(lines, one) for one in tree.body if isinstance(one, ast.FunctionDef)}


def imported_functions(path: Path, tree: ast.Module) -> dict[str, str]:
    """The source of functions that a module takes from its neighbours, under the names that it calls them by."""
    found: dict[str, str] = {}
    for one in tree.body:
        if not isinstance(one, ast.ImportFrom) or one.module is None:
            continue
        for alias in one.names:
            called = alias.asname or alias.name
            found |= {f"{called}.{name}": text for name, text in neighbour(path.parent / f"{alias.name}.py").items()}
            of_module = neighbour(path.parent / f"{one.module.rpartition('.')[2]}.py")
            if alias.name in of_module:
                found[called] = of_module[alias.name]
    return found


@lru_cache
def neighbour(path: Path) -> Mapping[str, str]:
    """The functions of a module, none where there is no such file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return functions_of(ast.parse(text), text.splitlines(keepends=True))


def changes_of(node: ast.expr, lines: list[str], functions: Mapping[str, str]) -> dict[str, str]:
    """``replacing(part=...)``, ``trainer(part=...)`` and ``around("part", ...)`` as part -> source, functions written
    out, and what makes one behind its call; another change under no part."""
    found: dict[str, str] = {}
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        kind = ast.unparse(call.func)
        pairs: list[tuple[str, ast.expr]] = []
        if kind in ("replacing", "trainer", "TrainerParts"):
            pairs = [(word.arg, word.value) for word in call.keywords if word.arg]
        elif kind == "around" and len(call.args) == 2 and isinstance(call.args[0], ast.Constant):
            pairs = [(str(call.args[0].value), call.args[1])]
        for part, value in pairs:
            source = segment(lines, value)
            made_by = [functions[f] for f in called_in(value) if f in functions]
            found[part] = functions.get(source) or "\n\n".join([source, *made_by[:1]])
    if not found:  # made by a helper: what it is given, or the call itself
        helpers = {id(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
        names = [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and id(one) not in helpers]
        given = [functions[name] for name in names if name in functions]
        found[""] = "\n".join(dict.fromkeys(given)) or segment(lines, node)
    return found


def called_in(node: ast.expr) -> list[str]:
    """What an expression calls, from the outside in."""
    return [ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)]


def segment(lines: list[str], node: ast.expr | ast.FunctionDef) -> str:
    """The source of a node."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    first, last = node.lineno - 1, node.end_lineno - 1
    if first == last:
        return lines[first].encode()[node.col_offset : node.end_col_offset].decode()
    head = lines[first].encode()[node.col_offset :].decode()
    return "".join([head, *lines[first + 1 : last], lines[last].encode()[: node.end_col_offset].decode()])


def part_source(spec: Spec, part: str) -> str:
    """How the right loss computes a part: the source of the function of that name, or an empty text."""
    return _part(spec.package, part)


@lru_cache
def _part(package: str, part: str) -> str:
    for path in [*modules(f"{package}.defects", "*parts.py"), *modules(f"{package}.defects", "*_variants.py")]:
        text = path.read_text(encoding="utf-8")
        for one in ast.parse(text).body:
            if isinstance(one, ast.FunctionDef) and one.name == part:
                return segment(text.splitlines(keepends=True), one)
    return ""


def constants(tree: ast.Module) -> dict[str, Any]:
    """The module's names whose values are written out, those it imports from this package included."""
    found: dict[str, Any] = {"Level.MUST": "MUST", "Level.SHOULD": "SHOULD"}
    found |= {f"Capability.{entry.name}": entry.value for entry in Capability}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("sdpo_conformance"):
            wanted = [alias for alias in statement.names if alias.name.isupper()]
            if wanted:
                there = constants_of(statement.module or "")
                found |= {alias.asname or alias.name: there[alias.name] for alias in wanted if alias.name in there}
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                found[statement.targets[0].id] = value_of(statement.value, found)
            except NotWrittenOut:
                continue
    return found


@cache
def constants_of(module: str) -> Mapping[str, Any]:
    """The names that another module of this package writes out."""
    return constants(ast.parse(source_file(module).read_text(encoding="utf-8")))


@lru_cache
def source_file(module: str) -> Path:
    """The file of a module of this package."""
    base = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def value_of(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """A text or a tuple of texts; raises NotWrittenOut."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name | ast.Attribute):
        key = ast.unparse(node)
        if key not in names:
            raise NotWrittenOut(key)
        return names[key]
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(value_of(part.value if isinstance(part, ast.FormattedValue) else part, names)) for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return value_of(node.left, names) + value_of(node.right, names)
    if isinstance(node, ast.Tuple | ast.List):
        items: list[Any] = []
        for one in node.elts:
            if isinstance(one, ast.Starred):
                items.extend(value_of(one.value, names))
            else:
                items.append(value_of(one, names))
        return tuple(items)
    raise NotWrittenOut(ast.unparse(node)[:80])
