"""Put the table of published/matrix.json into index.md, between its two markers.

sdpo-conformance matrix A B C --out docs/results/published
python docs/pages/publish.py
"""

from __future__ import annotations

from pathlib import Path

from sdpo_conformance.matrix.cells import Row, rows_of, tally
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.matrix.gather import read_columns

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


def main() -> None:
    """Rewrite index.md."""
    source = HERE / "published" / "matrix.json"
    columns = read_columns(source)
    rows = rows_of(columns)
    told = dict.fromkeys(where(column) for column in columns if column.results is not None)
    table = [
        *(f"- {machine}" for machine in told),
        "",
        "| implementation | package | device | MUST | SHOULD | recognised as | profile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(line(column, rows) for column in columns),
    ]
    page = HERE / "index.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{chr(10).join(table)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
