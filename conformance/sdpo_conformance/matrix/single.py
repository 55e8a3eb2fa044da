"""``run --html``: the matrix page of one implementation, with its verdict, and for each failing input its tensors
beside the oracle's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdpo_conformance.matrix.cells import rows_of
from sdpo_conformance.matrix.columns import Column
from sdpo_conformance.matrix.document import time_stamp
from sdpo_conformance.matrix.page import page, templates
from sdpo_conformance.matrix.provenance import version_of
from sdpo_conformance.protocol import Capability

MOST_SHOWN = 12
"""Failing inputs that are written out."""

MOST_VALUES = 16
"""Values of one tensor that are written out."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor at the worst token: what was given or came back, and the truth, empty where there is none. ``wrong``:
    they differ by more than the bound."""

    name: str
    got: str
    truth: str = ""
    wrong: bool = False


def single_page(results: Mapping[str, Any], folder: Path) -> str:
    """The page of one run, whole; ``folder`` holds what was observed."""
    column = Column.judged(results, folder, version_of(results["implementation"]))
    judged = {record["requirement"] for record in results["records"]}
    rows = [row for row in rows_of([column], results["run"]["only"]) if row.id in judged]
    parts = templates().get_template("single.html.jinja").module
    return page(
        [column],
        rows,
        time_stamp(datetime.now(UTC)),
        above=parts.above(results),  # type: ignore[attr-defined]
        below=parts.below(list(tensors_of(results, folder))),  # type: ignore[attr-defined]
    )


def tensors_of(results: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """A table for each failing input: what went in, each intermediate of the oracle, and what came back beside it. The
    failures that name a rule come first, so that none of them is left out for one that follows."""
    failed = [record for record in results["records"] if record["status"] == "failed"]
    failed.sort(key=lambda record: bool(record["failure"].get("secondary")))
    observed = [
        record for record in failed if (name := record["failure"].get("observed")) and (folder / name).is_file()
    ]
    for record in observed[:MOST_SHOWN]:
        yield {
            "requirement": record["requirement"],
            "entry": record["entry"],
            "words": record["failure"].get("words", ""),
            "rows": list(beside(results, record["entry"], folder / record["failure"]["observed"])),
        }


def beside(results: Mapping[str, Any], entry: str, path: Path) -> Iterator[TensorRow]:
    """The inputs at the worst token, the oracle's intermediates there, the results and gradients."""
    import torch
    from safetensors.torch import load_file

    from sdpo_conformance.specs import find_spec

    parts = find_spec(results["spec"]["name"]).parts
    case = parts.load(path)
    got = {name.removeprefix("got."): value for name, value in load_file(path).items() if name.startswith("got.")}
    truth = parts.intermediates(case)
    bounds = parts.expectations(case, Capability(entry))
    expected = {**bounds.results, **{f"gradient.{name}": one for name, one in bounds.gradients.items()}}
    shape = tuple(case.tensors()["response_ids"].shape)

    def each_token(tensor: Any) -> bool:
        return tensor.dim() >= 2 and tuple(tensor.shape[:2]) == shape and tensor[..., :1].numel() > 0

    token = (0, 0)
    for name, value in got.items():
        if each_token(value) and name in expected and expected[name].value.shape == value.shape:
            excess = expected[name].excess(value).reshape(*shape, -1).amax(-1)
            token = tuple(int(index) for index in torch.unravel_index(excess.argmax(), excess.shape))  # type: ignore[assignment]
            break
    yield TensorRow("token", f"row {token[0]}, position {token[1]}")
    for name, tensor in case.tensors().items():
        yield TensorRow(name, values(tensor[token] if each_token(tensor) else tensor))
    for name, tensor in truth.per_token.items():
        if tensor.numel():
            yield TensorRow(name, "", values(tensor[token]))
    for name, value in got.items():
        true = expected[name].value if name in expected else truth.returned.get(name)
        told = "" if true is None else values(true[token] if each_token(true) else true)
        same_shape = name in expected and expected[name].value.shape == value.shape
        wrong = same_shape and bool((expected[name].excess(value) > 1).any())
        yield TensorRow(name, values(value[token] if each_token(value) else value), told, wrong)


def values(tensor: Any) -> str:
    """The first values, and how many more there are."""
    flat = tensor.reshape(-1).tolist()
    text = ", ".join(f"{value:.7g}" for value in flat[:MOST_VALUES])
    return f"{text}, and {len(flat) - MOST_VALUES} more" if len(flat) > MOST_VALUES else text
