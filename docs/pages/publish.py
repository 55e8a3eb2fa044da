"""Draw the pages and badges of published/ anew from its matrix.json, and put its tables into index.md and own-rules.md,
between their markers.

sdpo-conformance matrix A B C --out docs/results/published
sdpo-conformance matrix A B --spec trl --out docs/results/published/trl
python docs/pages/publish.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sdpo_conformance.matrix.cells import Row, rows_of, tally
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.matrix.gather import read_columns
from sdpo_conformance.matrix.matrix_files import write_matrix

HERE = Path(__file__).parents[1] / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def line(column: Column, rows: list[Row]) -> str:
    """One implementation's row of the table."""
    start = f"| `{column.implementation}` | {column.version or 'unknown'} | {column.device} | "
    if column.results is None:
        return f"{start}{column.standing} | | | |"
    counts = [tally(column, [row for row in rows if row.level == level]) for level in ("MUST", "SHOULD")]
    run, diagnosis = column.results["run"], column.results["diagnosis"]
    names = dict.fromkeys(match["name"] for match in diagnosis["matches"]) if diagnosis else ()
    limits = f", only {' '.join(run['only'])}, {' '.join(run['dtypes'])}" if run["only"] else ""
    met = " | ".join(f"{met}/{judged}" if judged else "" for met, judged in counts)
    return f"{start}{met} | {', '.join(names)} | {run['profile']}{limits} |"


def where(column: Column) -> str:
    """Device and versions of a run."""
    assert column.results is not None
    run = column.results["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['device']}: {run.get('device_name') or 'CPU'}, {versions}"


SPECS = ("lasgroup", "trl", "ms-swift", "verl-topk")
"""Specs beside CLaaS, whose results lie in folders of their own."""

HEADS = (
    "| implementation | package | device | MUST | SHOULD | recognised as | profile |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def machines(columns: list[Column]) -> list[str]:
    """One line for each machine that a column was judged on."""
    return [f"- {one}" for one in dict.fromkeys(where(column) for column in columns if column.results is not None)]


def table(columns: list[Column]) -> list[str]:
    """The columns as the rows of a table."""
    rows = rows_of(columns)
    return [*HEADS, *(line(column, rows) for column in columns)]


def rewrite(page: Path, lines: list[str]) -> None:
    """Put ``lines`` between the page's markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join(lines)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def redrawn(folder: Path) -> list[Column]:
    """The columns of a stored matrix, its page and badges written as they are drawn today."""
    content = json.loads((folder / "matrix.json").read_text(encoding="utf-8"))
    columns = read_columns(folder / "matrix.json")
    badges = (folder / "badges").is_dir()
    write_matrix(folder, content, columns, rows_of(columns))
    if not badges:
        shutil.rmtree(folder / "badges")
    return columns


def main() -> None:
    """Rewrite the pages, index.md and own-rules.md."""
    published = HERE / "published"
    columns = redrawn(published)
    rewrite(HERE / "index.md", [*machines(columns), "", *table(columns)])
    sections: list[str] = []
    for name in SPECS:
        columns = redrawn(published / name)
        sections += [f"## {name}", "", *machines(columns), "", *table(columns), ""]
    rewrite(HERE / "own-rules.md", sections[:-1])


if __name__ == "__main__":
    main()
