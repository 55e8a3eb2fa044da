"""What a run can be asked for: checked once, turned into pytest's arguments, and read back from them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_conformance.judging.profiles import PROFILES, Profile
from sdpo_conformance.protocol import DTYPE_NAMES
from sdpo_conformance.running.folder import default_folder
from sdpo_conformance.sharded.mesh import MeshShape
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.spec import Spec


class RunError(Exception):
    """The run itself could not happen; the message is one line, the exit status 2."""


@dataclass(frozen=True)
class RunOptions:
    """``spec`` and ``profile`` by name; ``seed`` reproduces a run; ``device`` cpu, cuda or cuda:N; ``dtypes``: only
    these (none: what the implementation claims or takes); ``only``: requirements or families (none: all); ``jobs``:
    worker processes, 0: one per core, at most 8, 4 on a GPU; ``call_timeout``: seconds one call of the implementation
    may take; ``out``: folder for results, None: ``.sdpo-conformance/IMPL``; ``xfails``: a file of expected failures, a
    requirement id and its reason a line; ``first_cause``: stop at the first failure that names a rule; ``mesh``: judge
    on ranks, "tp=2,dp=2", by the sharded requirements.

    Raises RunError for a value that no run can have.
    """

    spec: str = DEFAULT
    profile: str = "default"
    seed: int = 0
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    jobs: int = 0
    call_timeout: float = 120.0
    out: Path | None = None
    xfails: Path | None = None
    first_cause: bool = False
    mesh: str = ""

    def __post_init__(self) -> None:
        try:
            families = find_spec(self.spec).families
        except ValueError as error:
            raise RunError(str(error)) from None
        self._one_of("profile", self.profile, PROFILES)
        for name in self.dtypes:
            self._one_of("dtype", name, DTYPE_NAMES)
        for name in () if self.mesh else self.only:
            wanted = name.strip().upper()
            family = wanted if wanted in families else wanted.rsplit("-", 1)[0]
            by_words = {words.upper(): id for id, words in families.items()}
            if (near := difflib.get_close_matches(wanted.replace("-", " "), by_words, n=1)) and family not in families:
                raise RunError(
                    f"no requirement or family {name!r}; did you mean {by_words[near[0]]} ({near[0].lower()})?"
                )
            self._one_of("requirement or family", family, families, shown=name)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise RunError(f"no device {self.device!r}; devices: cpu, cuda, cuda:N")
        if self.jobs < 0:
            raise RunError(f"--jobs must be 0 (one per core) or more, got {self.jobs}")
        if not self.call_timeout > 0:
            raise RunError(f"--call-timeout must be positive, got {self.call_timeout:g}")
        if self.mesh:
            try:
                MeshShape.parse(self.mesh)
            except ValueError as error:
                raise RunError(str(error)) from None
        else:
            self._ids_exist()
        if self.xfails is not None:
            try:
                expected_failures(self.xfails, self.found_spec)
            except ValueError as error:
                raise RunError(str(error)) from None

    def _ids_exist(self) -> None:
        """An id that no rule has is noticed before anything is started."""
        if not self.only:
            return
        known = requirement_ids(self.found_spec)
        for name in self.only:
            wanted = name.strip().upper()
            if known and "-" in wanted and wanted not in known and wanted not in self.found_spec.families:
                near = difflib.get_close_matches(wanted, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise RunError(f"no requirement or family {name!r}{hint}; sdpo-conformance list requirements")

    def _one_of(self, what: str, name: str, known: Sequence[str] | Mapping[str, Any], shown: str = "") -> None:
        if name in known:
            return
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RunError(f"no {what} {shown or name!r}; there are {', '.join(known)}{hint}")

    @property
    def found_spec(self) -> Spec:
        return find_spec(self.spec)

    @property
    def found_profile(self) -> Profile:
        return PROFILES[self.profile]

    @property
    def workers(self) -> int:
        """Worker processes: never none, for the implementation may crash."""
        most = 4 if self.device.startswith("cuda") else 8
        return self.jobs or max(1, min(os.cpu_count() or 1, most))

    def folder(self, target: str) -> Path:
        """Where the run of ``target`` leaves its results; a spec beside the default has a folder of its own."""
        if self.out is not None:
            return self.out
        folder = default_folder(target)
        return folder if self.spec == DEFAULT else folder.with_name(f"{folder.name}.{self.spec}")

    def arguments(self, target: str) -> list[str]:
        """The pytest arguments that ``read`` reads back."""
        plain = {
            "impl": target,
            "spec": self.spec,
            "profile": self.profile,
            "seed": self.seed,
            "device": self.device,
            "jobs": self.jobs,
            "call-timeout": f"{self.call_timeout:g}",
            "out": self.folder(target),
        }
        if self.xfails is not None:
            plain["xfails"] = self.xfails
        lists = {"dtype": self.dtypes, "only": self.only}
        return [
            *(["--first-cause"] if self.first_cause else []),
            *(f"--{name}={value}" for name, value in plain.items()),
            *(f"--{name}={value}" for name, values in lists.items() for value in values),
        ]

    @classmethod
    def read(cls, option: Any) -> RunOptions:
        """From the values that ``declare``'s options were given."""
        return cls(
            spec=option.spec,
            profile=option.profile,
            seed=option.seed,
            device=option.device,
            dtypes=tuple(option.dtype or ()),
            only=tuple(option.only or ()),
            jobs=option.jobs,
            call_timeout=option.call_timeout,
            out=Path(option.out) if option.out else None,
            xfails=Path(option.xfails) if option.xfails else None,
            first_cause=option.first_cause,
        )


def declare(group: Any) -> None:
    """Tell pytest of the options, ``group`` being one of its option groups."""
    defaults = RunOptions()
    group.addoption("--impl", default="reference", help="module, module:object, .py file, or a bundled name")
    group.addoption("--spec", default=defaults.spec, help="the spec to judge by")
    group.addoption("--profile", default=defaults.profile, help="how many examples")
    group.addoption("--seed", default=defaults.seed, type=int, help="reproduces a run")
    group.addoption("--device", default=defaults.device, help="cpu, cuda or cuda:N")
    group.addoption("--dtype", action="append", help="judge only in this dtype (repeatable)")
    group.addoption("--only", action="append", help="a requirement or a family, such as IS (repeatable)")
    group.addoption("--out", default="", help="folder for results; default .sdpo-conformance/IMPL")
    group.addoption("--jobs", default=defaults.jobs, type=int, help="worker processes; 0: one per core, at most 8")
    group.addoption(
        "--call-timeout",
        default=defaults.call_timeout,
        type=float,
        help="seconds one call of the implementation may take",
    )
    group.addoption("--xfails", default="", help="file of expected failures: id and reason a line")
    group.addoption("--first-cause", action="store_true", help="stop at the first failure that names a rule")


def expected_failures(path: Path, spec: Spec) -> dict[str, str]:
    """Requirement id -> reason, from a file with ``ID reason`` a line; ``#`` begins a comment. Raises ValueError for a
    file that cannot be read, an id that no rule has, and a line without a reason."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--xfails: cannot read {path}: {why}") from None
    known = requirement_ids(spec)
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        id, _, reason = text.partition(" ")
        id = id.upper().rstrip(":")
        if known and id not in known:
            near = difflib.get_close_matches(id, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}:{number}: no requirement {id!r}{hint}")
        if not reason.strip():
            raise ValueError(
                f"{path}:{number}: {id} has no reason; expected a line such as '{id} padding is finite here'"
            )
        found[id] = reason.strip()
    return found


def requirement_ids(spec: Spec) -> list[str]:
    """The ids of a spec's rules, read from their source without importing torch."""
    from sdpo_conformance.specs.rule_index import rule_index

    return [rule.id for rule in rule_index(spec)]
