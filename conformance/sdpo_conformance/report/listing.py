"""``list``: what there is to name, one a line. Torch is imported for computed defects alone, once."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec as find_module
from pathlib import Path

from sdpo_conformance.specs import specs
from sdpo_conformance.specs.rule_index import computed_defects, defect_index, rule_index
from sdpo_conformance.specs.spec import Spec

KINDS = ("requirements", "defects", "implementations", "specs")


def listing(kind: str, spec: Spec) -> Iterator[tuple[str, str]]:
    """Name and words of each; ``kind`` is one of KINDS."""
    if kind == "requirements":
        for rule in rule_index(spec):
            yield rule.id, f"{rule.statement}{' (SHOULD)' if rule.level == 'SHOULD' else ''}"
    elif kind == "defects":
        for defect in (*defect_index(spec), *computed_defects(spec)):
            yield (
                f"defect:{defect.name}",
                f"{defect.sentence} ({defect.violates[0] if defect.violates else 'a dialect'})",
            )
    elif kind == "implementations":
        yield "reference", "plain PyTorch, every entry"
        yield "triton_fused", "fused Triton kernels; needs triton"
        for name in adapters():
            yield f"adapters.{name}", "a published package; judged where it is installed"
        yield "defect:NAME", "the executable form of a catalogued defect: list defects"
    else:
        for one in specs():
            yield one.name, f"{one.label}: {one.source}"


def adapters() -> list[str]:
    """The names of the bundled adapters, from their files."""
    package = find_module("sdpo_implementations")
    if package is None or not package.submodule_search_locations:
        return []
    folder = Path(package.submodule_search_locations[0]) / "adapters"
    helpers = ("__init__", "availability", "teacher")
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in helpers)
