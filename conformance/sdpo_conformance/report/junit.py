"""Results as JUnit XML, for CI systems. By hand: one element per record; the libraries that write it (junit-xml,
junitparser) are longer to call than this is, and pytest's own writer knows pytest's items alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from sdpo_conformance.judging.records import Status


def junit_xml(results: Mapping[str, Any]) -> str:
    """One test case per requirement and entry."""
    records = results["records"]
    failed = [
        record
        for record in records
        if record["status"] in (Status.FAILED, Status.UNEXPECTED_PASS, Status.INTERNAL_ERROR)
    ]
    skipped = [record for record in records if record["status"] in (Status.NOT_JUDGED, Status.EXPECTED_FAILURE)]
    suite = ElementTree.Element(
        "testsuite",
        name=f"SDPO conformance of {results['implementation']}",
        tests=str(len(records)),
        failures=str(len(failed)),
        errors="0",
        skipped=str(len(skipped)),
        time=str(results["run"]["seconds"]),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in {
        "spec": f"{results['spec']['name']} {results['spec']['version']}",
        "verdict": results["verdict"]["text"],
    }.items():
        ElementTree.SubElement(properties, "property", name=name, value=value)
    for record in records:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"{results['implementation']}.{record['entry']}",
            name=f"{record['requirement']} {record['statement']}",
            time=str(record["seconds"]),
        )
        if record in failed:
            failure = record["failure"]
            message = failure.get("summary", record["reason"])
            if record["status"] == Status.UNEXPECTED_PASS:
                message = f"UNEXPECTED PASS: {message}"
            child = ElementTree.SubElement(case, "failure", type=record["level"], message=message)
            child.text = "\n".join(filter(None, [message, failure.get("words", ""), f"source: {record['source']}"]))
        elif record in skipped:
            expected = "expected failure: " if record["status"] == Status.EXPECTED_FAILURE else ""
            ElementTree.SubElement(case, "skipped", message=f"{expected}{record['reason']}")
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
