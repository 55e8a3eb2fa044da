"""At the end of a run: records together, what a crash lost, the diagnosis, and results.json."""

from __future__ import annotations

import json
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.files import write_json
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.places import place
from sdpo_conformance.judging.records import Record, Status, read_records, record_key, write_record
from sdpo_conformance.protocol import Capability
from sdpo_conformance.report.results import results_of
from sdpo_conformance.reproduction.failure import failure_of
from sdpo_conformance.running.folder import DIAGNOSING, RESULTS


def collect(run: Any) -> None:
    """Write results.json for a finished session (``plugin.Session``)."""
    folder: Path = run.folder
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    if run.options.first_cause:
        begun = {path.stem for name in ("records", "running") for path in (folder / name).glob("[!.]*.json")}
        plan = [one for one in plan if record_key(**one) in begun]
    for entry in plan:
        key = record_key(entry["requirement"], entry["entry"])
        if not (folder / "records" / f"{key}.json").exists():
            write_record(folder, lost_record(run, entry["requirement"], Capability(entry["entry"]), key))
    records = read_records(folder)
    ordered = [records[record_key(entry["requirement"], entry["entry"])] for entry in plan]
    order = list(run.spec.requirements())
    ordered.sort(key=lambda record: (list(Capability).index(Capability(record.entry)), order.index(record.requirement)))
    dtypes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "dtypes").glob("*.json"))]
    (folder / DIAGNOSING).touch()
    results = results_of(
        run.implementation,
        run.spec,
        ordered,
        run={
            "device": run.device,
            "device_name": device_name(run.device),
            "dtypes": [name for name in DTYPES if any(name in kept for kept, _ in dtypes)],
            "refused_dtypes": {name: why for _, refused in dtypes for name, why in refused.items()},
            "profile": run.profile.name,
            "seed": run.seed,
            "only": list(run.only),
            "first_cause": run.options.first_cause,
            "seconds": round(time.time() - run.started, 2),
            "versions": versions(),
        },
        folder=folder,
    )
    results["places"] = {
        entry.value: place(getattr(run.implementation.object, entry.value)) for entry in entries_of(plan)
    }
    write_json(folder / RESULTS, results)
    (folder / DIAGNOSING).unlink()


def entries_of(plan: list[dict[str, str]]) -> list[Capability]:
    """The entries of a plan, each once."""
    return [Capability(name) for name in dict.fromkeys(one["entry"] for one in plan)]


def lost_record(run: Any, requirement_id: str, entry: Capability, key: str) -> Record:
    """The verdict on a requirement whose process died: it failed, and the last input is the reproduction."""
    found = run.spec.requirements()[requirement_id]
    running = run.folder / "running" / f"{key}.json"
    log = ""
    if running.exists():
        pid = json.loads(running.read_text(encoding="utf-8"))["pid"]
        path = run.folder / "crashes" / f"{pid}.log"
        log = path.read_text(encoding="utf-8") if path.exists() else ""
    error = ImplementationError(
        cause_of_death(log, entry, running.exists(), run.options.call_timeout), "\n".join(log.splitlines()[:12])
    )
    error.probe = "ends"
    case = running.with_suffix(".safetensors")
    if case.exists():
        with suppress(SafetensorError):  # killed while it was written
            error.case = run.spec.parts.load(case)
    expected = run.implementation.claims.expected_failures.get(requirement_id, "")
    return Record(
        requirement=requirement_id,
        entry=entry.value,
        level=found.level,
        status=Status.EXPECTED_FAILURE if expected else Status.FAILED,
        reason=expected,
        failure=failure_of(run.folder, run.target, run.device, run.spec, found, entry, error),
    )


def cause_of_death(log: str, entry: Capability, started: bool, limit: float) -> str:
    """One line from what faulthandler left; ``limit``: seconds that a call may last."""
    first = log.strip().splitlines()[0] if log.strip() else ""
    if first.startswith("Timeout"):
        return f"{entry.value} did not return within {limit:g} s (a hang; --call-timeout sets the limit)"
    if first.startswith("Fatal Python error"):
        return f"{entry.value} crashed the process: {first.removeprefix('Fatal Python error: ')}"
    if not started:
        return f"{entry.value} was not reached: its worker process kept dying"
    return f"{entry.value} ended the process without a word (os._exit, or killed from outside)"


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    if not device.startswith("cuda"):
        return platform.machine()
    import torch

    return torch.cuda.get_device_name(device)


def versions() -> dict[str, str]:
    """What decides about reproducibility."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("sdpo-conformance", "hypothesis", "triton", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
