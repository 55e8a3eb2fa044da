"""Failures as SARIF 2.1.0 and as GitHub's workflow commands: annotations at the line of the user's function.

Both are a dozen fields of plain JSON and text; the libraries for them model the whole of SARIF and read no more of it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sdpo_conformance.judging.records import Status

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
BAD = (Status.FAILED, Status.UNEXPECTED_PASS)
LEVELS = {"MUST": "error", "SHOULD": "warning"}


def place_of(results: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, int]:
    """The file and line to show a failure at: where it raised, else where the entry is written; ("", 0) if unknown."""
    where = record["failure"].get("where") or results.get("places", {}).get(record["entry"], "")
    path, _, line = where.rpartition(":")
    return (path, int(line)) if path and line.isdigit() else ("", 0)


def message_of(record: Mapping[str, Any]) -> str:
    """The rule and what was found, in one line."""
    found = record["failure"].get("summary") or record["reason"]
    return f"{record['requirement']}: {record['statement']}. {found}".strip()


def sarif(results: Mapping[str, Any], version: str) -> str:
    """One result per failed record, with the rules they name."""
    bad = [record for record in results["records"] if record["status"] in BAD]
    rules = {record["requirement"]: record for record in bad}
    found = []
    for record in bad:
        path, line = place_of(results, record)
        entry: dict[str, Any] = {
            "ruleId": record["requirement"],
            "level": LEVELS[record["level"]],
            "message": {"text": message_of(record)},
        }
        if path:
            location = {"artifactLocation": {"uri": path}, "region": {"startLine": line}}
            entry["locations"] = [{"physicalLocation": location}]
        found.append(entry)
    driver = {
        "name": "sdpo-conformance",
        "version": version,
        "rules": [
            {"id": id, "shortDescription": {"text": one["statement"]}, "help": {"text": one["source"]}}
            for id, one in rules.items()
        ],
    }
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": found}]}
    return json.dumps(document, indent=1) + "\n"


def github_annotations(results: Mapping[str, Any]) -> Iterator[str]:
    """``::error file=...,line=...,title=...::message``, one a failed requirement; expected failures are notices."""
    shown: set[str] = set()
    for record in results["records"]:
        expected = record["status"] == Status.EXPECTED_FAILURE
        if record["requirement"] in shown or not (expected or record["status"] in BAD):
            continue
        shown.add(record["requirement"])
        kind = "notice" if expected else LEVELS[record["level"]]
        path, line = place_of(results, record)
        where = f"file={of_property(path)},line={line}," if path else ""
        words = f"expected to fail: {record['reason']}" if expected else message_of(record)
        yield f"::{kind} {where}title={of_property('SDPO ' + record['requirement'])}::{of_message(words)}"


def of_message(text: str) -> str:
    """Escaped as the runner reads it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def of_property(text: str) -> str:
    """Escaped as the runner reads a property."""
    return of_message(text).replace(":", "%3A").replace(",", "%2C")
