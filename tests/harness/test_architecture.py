"""The house: rooms, arrows in one direction, and one name for one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from sdpo_conformance.specs import FOLDERS, specs

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "conformance" / "sdpo_conformance"
IMPLEMENTATIONS = ROOT / "implementations" / "sdpo_implementations"

LAYERS = (
    ("cli", "judge_command", "parametrize", "__main__", "__init__"),
    ("audit", "bench", "matrix"),
    ("running",),
    ("report",),
    tuple(f"specs.{folder}" for folder in FOLDERS.values()),
    ("specs.shared", "sharded"),
    ("reproduction",),
    ("trainer",),
    ("judging",),
    ("inputs",),
    ("cases",),
    ("specs.spec", "specs.requirement", "specs"),
    ("files",),
    ("protocol",),
)
"""From the front doors down: a module imports from its own layer and from those below."""


def modules(folder: Path) -> dict[str, Path]:
    """Every module by its dotted name, without the package's own."""
    found = {}
    for path in folder.rglob("*.py"):
        if "vectors" in path.parts:
            continue
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """What a module imports of the harness, wherever in the file; what only types need does not count."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    typing_only = {id(inner) for node in guarded for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.removeprefix("sdpo_conformance.") for name in found if name.startswith("sdpo_conformance.")}


def layer(module: str) -> int:
    """The layer of a module: that of the longest prefix in the table."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        for number, names in enumerate(LAYERS):
            if ".".join(parts[:size]) in names:
                return number
    raise AssertionError(f"{module} stands in no layer of {__file__}: give it one")


def test_arrows_point_down() -> None:
    known = modules(HARNESS)
    upward = []
    for module, path in known.items():
        for wanted in imports(path):
            if wanted in known and layer(wanted) < layer(module):
                upward.append(f"{module} imports {wanted}")
    assert sorted(set(upward)) == []


def test_the_implementations_import_the_protocol_alone() -> None:
    wanted = {
        (str(path.relative_to(ROOT)), name) for path in modules(IMPLEMENTATIONS).values() for name in imports(path)
    }
    assert sorted((path, name) for path, name in wanted if name.partition(".")[0] != "protocol") == []


def test_specs_are_reached_through_their_values() -> None:
    """Nothing outside ``specs/`` imports what is in a spec's folder, or what specs share."""
    inside = tuple(f"specs.{folder}" for folder in (*FOLDERS.values(), "shared"))
    reaching = [
        f"{module} imports {wanted}"
        for module, path in modules(HARNESS).items()
        if not module.startswith("specs")
        for wanted in imports(path)
        if wanted.startswith(inside)
    ]
    assert reaching == []


def test_no_rule_is_named_outside_the_specs() -> None:
    """Not in code, a string or a comment: an id is a family of some spec, a hyphen and a number."""
    families = {name for spec in specs() for name in spec.families}
    families |= {name for spec in specs() if spec.parts.on_ranks for name in spec.parts.on_ranks().families}
    id = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(families))})-\d+\b")
    assert id.findall("see IS-6, TRL-IS-1 and VP-2, in UTF-8") == ["IS-6", "TRL-IS-1", "VP-2"]
    naming = [
        f"{path.relative_to(ROOT)}:{number}: {found}"
        for folder in (HARNESS, IMPLEMENTATIONS)
        for path in folder.rglob("*")
        if path.suffix in (".py", ".js", ".jinja", ".css") and (HARNESS / "specs") not in path.parents
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for found in id.findall(line)
    ]
    assert naming == []


def test_a_spec_knows_no_other_spec() -> None:
    specs = [
        path.name
        for path in (HARNESS / "specs").iterdir()
        if path.is_dir() and path.name not in ("shared", "__pycache__")
    ]
    crossing = [
        f"{module} imports {wanted}"
        for module, path in modules(HARNESS / "specs").items()
        for wanted in imports(path)
        for other in specs
        if module.partition(".")[0] in {*specs, "shared"} - {other} and wanted.startswith(f"specs.{other}.")
    ]
    assert crossing == []


def test_no_two_modules_share_a_name() -> None:
    """The folders of the specs are built alike, and so are those of the implementations."""
    places = defaultdict(set)
    for module in modules(HARNESS):
        parts = module.split(".")
        if parts[:1] != ["specs"] and "programs" not in parts:
            places[parts[-1]].add(module)
    shared = {name: found for name, found in places.items() if len(found) > 1 and name != "__main__"}
    assert shared == {}


def test_no_two_classes_share_a_name() -> None:
    """Of one spec, and outside the specs; a program that a failure leaves behind is a world of its own."""
    places = defaultdict(set)
    for module, path in modules(HARNESS).items():
        if "programs" in module or (module.startswith("specs.") and not module.startswith("specs.claas.")):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].add(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
