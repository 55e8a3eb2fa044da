"""The ``Parts`` of a spec whose folder holds a case kind, a builder, corners and a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.inputs.choices import HypothesisSource, SeededSource, Source
from sdpo_conformance.judging.records import Status, read_records
from sdpo_conformance.specs.shared.defect import SpecDefect
from sdpo_conformance.specs.shared.diagnosing import diagnose_spec_run
from sdpo_conformance.specs.shared.recordings import recordings
from sdpo_conformance.specs.shared.spec_case import CaseKind, SpecCase
from sdpo_conformance.specs.shared.teacher_diagnosis import diagnose_teacher, with_teacher
from sdpo_conformance.specs.shared.wrong_teachers import TeacherDefect
from sdpo_conformance.specs.spec import Parts, Spec

Build = Callable[[Source, Any, Sequence[torch.dtype]], SpecCase]


def visits(corner: Any, costly: bool) -> list[Any]:
    """``corner`` once for each kind of each of its fields that has several."""
    found = []
    for dimension in fields(corner):
        kinds = dict.fromkeys(getattr(corner, dimension.name))
        if len(kinds) > 1:
            found += [corner.but(**{dimension.name: kind}) for kind in kinds]
    return found


def recordings_folder(spec: Spec) -> Path:
    """Where a spec's recordings lie: package data, a copy of cases/ in the repository."""
    return Path(str(files("sdpo_conformance") / "vectors" / f"{spec.package.rpartition('.')[2]}_loss"))


def describe(case: SpecCase) -> str:
    """Shapes, dtypes, options, and how the input is handed over."""
    tensors = case.tensors()
    shape = "x".join(map(str, tensors["student_logits"].shape))
    parts = [f"{case.name}: {shape} logits" if case.name else f"{shape} logits"]
    defaults = vars(case.kind.training())
    changed = [f"{key}={value}" for key, value in vars(case.training).items() if value != defaults[key]]
    parts.append(" ".join(changed) or "default options")
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values() if one.is_floating_point()})
    parts.append(" and ".join(dtypes))
    absent = [one.name for one in fields(case.kind.input) if getattr(case.loss_input, one.name) is None]
    if absent:
        parts.append(f"without {', '.join(absent)}")
    if case.layout != "contiguous":
        parts.append(f"{case.layout} tensors")
    if case.incoming != 1:
        parts.append(f"incoming gradient {case.incoming:g}")
    return ", ".join(parts)


def parts_of(
    spec: Spec,
    kind: CaseKind,
    build: Build,
    neutral: Any,
    everything: Any,
    catalogue: Callable[[], Mapping[str, SpecDefect]],
    dialects: Sequence[SpecDefect],
    load: Callable[[str], Any],
    teachers: Sequence[TeacherDefect] = (),
) -> Parts:
    """``neutral``, ``everything``: corners; recorded cases are visited where every corner is. ``teachers``: known
    mistakes of an EMA teacher."""

    @cache
    def known() -> tuple[SpecCase, ...]:
        return tuple(
            SpecCase(kind.input(training=kind.training(**one.config), **one.inputs), kind, name=one.name)
            for one in recordings(recordings_folder(spec))
            if one.group == "cases"
        )

    def recorded(corner: Any, entry: Any, dtypes: Sequence[torch.dtype]) -> Iterator[SpecCase]:
        widest = max(dtypes, key=lambda dtype: -torch.finfo(dtype).eps)
        if corner != everything or widest not in (torch.float32, torch.float64):
            return
        yield from converted(widest)

    @cache
    def converted(dtype: torch.dtype) -> tuple[SpecCase, ...]:
        """One object for every requirement that judges the case: its truth and its bounds are computed once."""
        cases = []
        for case in known():
            floats = {key: value.to(dtype) for key, value in case.tensors().items() if value.is_floating_point()}
            cases.append(SpecCase(case.with_fields(**floats).loss_input, kind, name=case.name))
        return tuple(cases)

    def built(source: Source, corner: Any, entry: Any, dtypes: Sequence[torch.dtype], shape_of: Any = None) -> SpecCase:
        return build(source, corner, dtypes)

    @st.composite
    def strategy(
        draw: DrawFn, corner: Any, entry: Any, dtypes: Sequence[torch.dtype], shape_of: Any = None
    ) -> SpecCase:
        return build(HypothesisSource(draw), corner, dtypes)

    def ordinary(dtype: str, entry: Any) -> SpecCase:
        return build(SeededSource("ordinary"), neutral.but(size="small", support="few"), [DTYPES[dtype]])

    def diagnose(folder: Path, failed: Sequence[Any], offered: Sequence[Any]) -> Mapping[str, Any] | None:
        loss = diagnose_spec_run(folder, failed, spec, kind, [*catalogue().values(), *dialects])
        held = {one.requirement for one in read_records(folder).values() if one.status is Status.PASSED}
        return with_teacher(loss, diagnose_teacher(failed, held, spec, teachers))

    return Parts(
        visits=visits,
        build=built,
        strategy=strategy,
        recorded=recorded,
        expectations=lambda case, entry: case.expectations,
        load=lambda path: SpecCase.load(path, kind),
        describe=describe,
        ordinary=ordinary,
        defect=load,
        diagnose=diagnose,
    )
