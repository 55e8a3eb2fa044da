"""The tables of requirements of docs/spec.md and docs/spec-NAME.md, generated from the registry.

``python -m docs.pages.spec_page docs/spec.md docs/spec-trl.md`` rewrites the part between the markers; ``--check``
exits 1 where it is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdpo_conformance.specs import find_spec

BEGIN, END = "<!-- requirements: generated -->", "<!-- end of requirements -->"


def spec_of_page(path: Path) -> str:
    """The spec that a page is about, by its name."""
    return path.stem.removeprefix("spec").removeprefix("-") or "claas"


def requirement_tables(name: str = "claas") -> str:
    """One Markdown table per family."""
    sections = []
    spec = find_spec(name)
    known = spec.requirements()
    for family, words in spec.families.items():
        mine = [entry for entry in known.values() if entry.family == family]
        if not mine:
            continue
        rows = [f"### {family}: {words}", "", "| id | level | rule | why | source |", "| --- | --- | --- | --- | --- |"]
        for entry in mine:
            cells = (entry.id, str(entry.level), entry.statement, entry.why, entry.source)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        sections.append("\n".join(rows))
    return "\n\n".join(sections)


def updated(page: str, name: str = "claas") -> str:
    """The page with its generated part renewed; raises ValueError where the markers are missing."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page lacks the markers {BEGIN} and {END}")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n\n{requirement_tables(name)}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Rewrite or check one page."""
    paths = [Path(argument) for argument in arguments if not argument.startswith("--")]
    for path in paths:
        page = path.read_text(encoding="utf-8")
        renewed = updated(page, spec_of_page(path))
        if "--check" in arguments:
            if renewed != page:
                print(f"{path} is out of date: run python -m docs.pages.spec_page {path}", file=sys.stderr)
                return 1
        else:
            path.write_text(renewed, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
