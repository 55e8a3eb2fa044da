"""Judging the implementations one after another, each in processes of its own, and reading back earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sdpo_conformance.matrix.columns import Column, Standing
from sdpo_conformance.matrix.provenance import version_of
from sdpo_conformance.running.options import RunError, RunOptions
from sdpo_conformance.running.process import Progress, run_with

FORMAT = 1
"""The version of results.json and of matrix.json that is read here."""

Announce = Callable[[Column], None]


def gather(
    names: Sequence[str],
    options: RunOptions,
    versions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> list[Column]:
    """The columns for ``names``: implementations to judge, or ``.json`` files of earlier runs to show.

    ``versions`` states, by implementation, what cannot be found out. An implementation that cannot run gets a
    column that says why; raises RunError only for what is wrong with the request itself.
    """
    earlier = {name: read_columns(Path(name)) for name in names if name.endswith(".json")}
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise RunError(f"{doubled[0]} is named twice")
    versions = versions or {}
    columns: list[Column] = []
    folders: set[Path] = set()
    for name in names:
        found = earlier.get(name) or [judge(name, options, folder_for(name, options, folders), progress)]
        columns += [replace(one, version=versions.get(one.implementation, one.version)) for one in found]
        if announce is not None:
            for column in columns[-len(found) :]:
                announce(column)
    if unknown := sorted(set(versions) - {column.implementation for column in columns}):
        raise RunError(f"--package names {unknown[0]!r}, which is not in the matrix")
    return columns


def judge(name: str, options: RunOptions, folder: Path, progress: Progress | None = None) -> Column:
    """Run the suite on one implementation."""
    try:
        report = run_with(name, replace(options, out=folder), progress)
    except RunError as error:
        missing = str(error).startswith(Standing.NOT_INSTALLED)
        return Column(
            implementation=name,
            standing=Standing.NOT_INSTALLED if missing else Standing.COULD_NOT_RUN,
            device=options.device,
            version=version_of(name),
            message=str(error),
        )
    return Column.judged(report.results, report.folder, version_of(name))


def folder_for(name: str, options: RunOptions, taken: set[Path]) -> Path:
    """Where ``run`` leaves its results, with a number where two names would share a folder."""
    first = folder = options.folder(name)
    number = 2
    while folder in taken:
        folder = first.with_name(f"{first.name}-{number}")
        number += 1
    taken.add(folder)
    return folder


def read_columns(path: Path) -> list[Column]:
    """The column of a results.json, or those of a matrix.json; raises RunError where it is neither."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise RunError(f"{path} has format {content['format']!r}, expected {FORMAT}: judge it anew")
        if "implementations" in content:
            return [Column.from_json(one) for one in content["implementations"]]
        return [Column.judged(content, path.parent, version_of(content["implementation"]))]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{path} is neither a results.json nor a matrix.json of this suite") from None
