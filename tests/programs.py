"""Programs that a failure leaves, run to their end without importing torch for each.

A process that has imported it, and nothing of the suite, forks for every program: which has an interpreter's state,
a folder in ``sys.path`` and an exit status of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FORKS = """
import importlib, json, os, runpy, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    program, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv, sys.path[0] = [program], os.path.dirname(program)
        status = 0
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # to take torch down costs as much as a program
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

TORCH = ("torch", "torch.fx.experimental.symbolic_shapes")
"""The second is imported by the first gradient of a given incoming one."""


@dataclass(frozen=True)
class Ran:
    """What a program left: its exit status, negative where a signal ended it, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Programs:
    """The process that forks; ``modules``: what it imports; ``folder``: for what programs print."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder = folder
        command = [sys.executable, "-c", FORKS, *modules]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, program: Path) -> Ran:
        """Run a program to its end."""
        out, err = self.folder / "out", self.folder / "err"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(program), str(out), str(err)]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return Ran(status, out.read_text(), err.read_text())

    def end(self) -> None:
        """End the process."""
        self.process.communicate()
