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
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.spec import Spec


class RunError(Exception):
    """The run itself could not happen; the message is one line, the exit status 2."""


@dataclass(frozen=True)
class RunOptions:
    """``spec`` and ``profile`` by name; ``seed`` reproduces a run; ``device`` cpu, cuda or cuda:N; ``dtypes``: only
    these (none: what the implementation claims or takes); ``only``: requirements or families (none: all); ``jobs``:
    worker processes, 0: one per core, at most 8, 4 on a GPU; ``call_timeout``: seconds one call of the implementation
    may take; ``out``: folder for results, None: ``.sdpo-conformance/IMPL``.

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

    def __post_init__(self) -> None:
        try:
            families = find_spec(self.spec).families
        except ValueError as error:
            raise RunError(str(error)) from None
        self._one_of("profile", self.profile, PROFILES)
        for name in self.dtypes:
            self._one_of("dtype", name, DTYPE_NAMES)
        for name in self.only:
            wanted = name.strip().upper()
            family = wanted if wanted in families else wanted.rsplit("-", 1)[0]
            self._one_of("requirement or family", family, families, shown=name)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise RunError(f"no device {self.device!r}; devices: cpu, cuda, cuda:N")
        if self.jobs < 0:
            raise RunError(f"--jobs must be 0 (one per core) or more, got {self.jobs}")
        if not self.call_timeout > 0:
            raise RunError(f"--call-timeout must be positive, got {self.call_timeout:g}")

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
        lists = {"dtype": self.dtypes, "only": self.only}
        return [
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
