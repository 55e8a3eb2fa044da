"""DOCSTRING"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    from safetensors.torch import load_file
except ImportError as error:
    print(f"could not run: {error}", file=sys.stderr)
    raise SystemExit(125) from None

# filled in: begin
TARGET: dict[str, Any] = {"module": "mypkg.loss", "file": "", "attribute": [], "defect": "", "search": []}
ENTRY = "update_teacher"
DEVICE = "cpu"
RATE = 0.05
CALLS = 1
AT_REST: list[int] = []
TIED: dict[str, str] = {}
# filled in: end


def could_not_run(error: BaseException) -> NoReturn:
    """Says why and exits with 125: nothing is known of the defect."""
    print(f"could not run: {type(error).__name__}: {error}", file=sys.stderr)
    raise SystemExit(125) from None


def implementation() -> Any:
    """The entry; exits with 125 where it cannot be had."""
    sys.path.extend(folder for folder in TARGET["search"] if folder not in sys.path)
    try:
        if TARGET["file"]:
            spec = importlib.util.spec_from_file_location("implementation", TARGET["file"])
            assert spec is not None
            assert spec.loader is not None
            module: Any = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(Path(TARGET["file"]).parent))
            spec.loader.exec_module(module)
        elif TARGET["defect"]:
            module = importlib.import_module(TARGET["module"]).load(TARGET["defect"])
        else:
            module = importlib.import_module(TARGET["module"])
        for part in TARGET["attribute"]:
            module = getattr(module, part)
        return getattr(module, ENTRY)
    except (Exception, SystemExit) as error:
        could_not_run(error)


def inputs() -> dict[str, torch.Tensor]:
    """The tensors beside this file; exits with 125 where they, or the device, cannot be had."""
    try:
        torch.empty(0, device=DEVICE)
        return load_file(Path(__file__).with_suffix(".safetensors"))
    except Exception as error:
        could_not_run(error)


stored: dict[str, torch.Tensor] = {}
wrong: list[str] = []
State = dict[str, torch.Tensor]


def weights(prefix: str) -> State:
    """The state dict that was stored under a prefix, fresh tensors."""
    found = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    state = {name: value.clone().to(DEVICE) for name, value in found.items()}
    return state | {name: state[other] for name, other in TIED.items() if other in state}


def update(teacher: State, given: State) -> State:
    """One call; the student must stay as it is, share no memory with the teacher, and have no graph from it."""
    student = {name: value.clone().requires_grad_() for name, value in given.items()}
    found = entry(teacher, student, RATE)
    found = teacher if found is None else dict(found)
    kept = {name: value.detach().clone() for name, value in found.items()}
    for name, value in student.items():
        if not torch.equal(value.detach(), given[name]):
            wrong.append(f"the student's {name} was changed")
        if found[name].requires_grad:
            wrong.append(f"the teacher's {name} has a graph")
        with torch.no_grad():
            value.add_(1.0)
        if not torch.equal(found[name].detach(), kept[name]):
            wrong.append(f"the teacher's {name} moved with the student's")
    return kept


def judged(teacher: State, student: State, words: str) -> State:
    """One call whose outcome must be (1 - rate) teacher + rate student, within four roundings."""
    before = {name: value.clone() for name, value in teacher.items()}
    after = update(teacher, student)
    for name, value in before.items():
        t, s = value.double(), student[name].double()
        eps = max(torch.finfo(one.dtype).eps for one in (value, student[name]))
        bound = 4 * eps * (t.abs() + RATE * s.abs()) + torch.finfo(value.dtype).tiny
        off = (after[name].double() - ((1 - RATE) * t + RATE * s)).abs()
        if bool((off > bound).any()) or bool(off.isnan().any()):
            wrong.append(f"{name} {words}: off by up to {off.max().item():.3g}")
    return after


def delta(state: State, name: str) -> torch.Tensor:
    """What an adapter adds to a layer."""
    return state[name.replace(".lora_A.", ".lora_B.")].double() @ state[name].double()


def adapter_at_rest() -> None:
    """After n batches with a student at rest the teacher's B A is 1 - (1 - rate)^n of the student's."""
    teacher, student = weights("teacher."), weights("student0.")
    for call in range(1, max(AT_REST) + 1):
        teacher = update(teacher, student)
        share = 1 - (1 - RATE) ** call
        for name in [one for one in student if ".lora_A." in one] if call in AT_REST else []:
            whole = delta(student, name)
            if float((delta(teacher, name) - share * whole).abs().max() / whole.abs().max()) > 1e-3 * share:
                got = float((delta(teacher, name) * whole).sum() / whole.square().sum())
                wrong.append(f"{name} after {call} batches: expected {share:.4g} of the student's, got {got:.4g}")


def main() -> None:
    """The calls as the failure was seen."""
    if AT_REST:
        adapter_at_rest()
        return
    teacher = weights("teacher.")
    for call in range(CALLS):
        teacher = judged(teacher, weights(f"student{call}."), f"after call {call + 1}")
    if other := weights("other."):
        judged(other, weights("student0."), "after a call with another teacher")


if __name__ == "__main__":
    entry = implementation()
    stored.update(inputs())
    try:
        main()
    except Exception as error:
        wrong.append(f"raised {type(error).__name__}: {error}")
    print("\n".join(dict.fromkeys(wrong)) or "no disagreement: the defect is gone")
    raise SystemExit(bool(wrong))
