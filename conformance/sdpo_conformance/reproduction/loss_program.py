"""Writing a failure as a program of plain PyTorch that shows it without this harness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from sdpo_conformance.cases.loss_case import LossCase, divergence_incoming
from sdpo_conformance.judging.implementation import BUNDLED
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import Expectations, expectations
from sdpo_conformance.specs.requirement import Requirement

VALUES = """\
loss_input = fresh_input()
result = call(loss_input)
gradients = backward(loss_input, result)
for name, value in result.items():
    judge(name, value)
for name, gradient in zip({differentiable}, gradients):
    judge(f"gradient.{{name}}", gradient)
"""

BODIES = {
    "values": VALUES,
    "raises": """\
try:
    loss_input = fresh_input()
    backward(loss_input, call(loss_input))
except BaseException as error:
    wrong.append(f"raised {{type(error).__name__}}: {{error}}")
""",
    "types": """\
result = call(fresh_input())
missing = [key for key in ("loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction") if key not in result]
if missing:
    wrong.append(f"missing keys: {{missing}}")
for key, value in result.items():
    tensor = isinstance(value, torch.Tensor)
    if key == "loss" and not (tensor and value.dim() == 0 and value.requires_grad):
        wrong.append(f"loss: expected a differentiable 0-dim tensor, got {{value!r}}")
    if key != "loss" and (value.dim() > 0 or value.requires_grad if tensor else not isinstance(value, (int, float))):
        wrong.append(f"{{key}}: expected a float or a 0-dim tensor without graph, got {{value!r}}")
""",
    "unmodified": """\
loss_input = fresh_input()
backward(loss_input, call(loss_input))
for name in {fields}:
    if not torch.equal(torch.nan_to_num(getattr(loss_input, name).detach().cpu()), torch.nan_to_num(stored[name])):
        wrong.append(f"{{name}} was modified")
""",
    "old_gradient": """\
loss_input = fresh_input()
loss_input.old_student_logprobs.requires_grad_()
(gradient,) = torch.autograd.grad(call(loss_input)["loss"], [loss_input.old_student_logprobs], allow_unused=True)
if gradient is not None and gradient.any():
    wrong.append(f"old_student_logprobs receives a gradient, up to {{gradient.abs().max().item():.7g}}")
""",
    "frozen_inputs": """\
loss_input = fresh_input()
output = call(loss_input)[{output!r}]
output.backward(stored["incoming"].to(output))
for name in {fields}:
    tensor = getattr(loss_input, name)
    if name not in {differentiable} and (tensor.requires_grad or tensor.grad is not None):
        wrong.append(f"{{name}} requires grad or received one")
""",
    "two_graphs": """\
first, second = fresh_input(), fresh_input("other.")
result = call(first)
call(second)[{output!r}].sum().backward()
for name, value in result.items():
    judge(name, value)
for name, gradient in zip({differentiable}, backward(first, result)):
    judge(f"gradient.{{name}}", gradient)
""",
    "accumulate": """\
loss_input = fresh_input()
for _ in range(2):
    output = call(loss_input)[{output!r}]
    output.backward(stored["incoming"].to(output))
for name in {differentiable}:
    gradient = getattr(loss_input, name).grad
    judge(f"gradient.{{name}}", None if gradient is None else gradient / 2)
""",
    "backward_twice": """\
loss_input = fresh_input()
output = call(loss_input)[{output!r}]
leaves = [getattr(loss_input, name) for name in {differentiable}]
incoming = stored["incoming"].to(output)
torch.autograd.grad(output, leaves, incoming, retain_graph=True, allow_unused=True)
for name, gradient in zip({differentiable}, torch.autograd.grad(output, leaves, incoming, allow_unused=True)):
    judge(f"gradient.{{name}}", gradient)
""",
    "changed_in_place": """\
loss_input = fresh_input("other.")
backward(loss_input, call(loss_input))
with torch.no_grad():
    for name in {fields}:
        getattr(loss_input, name).copy_(stored[name])
result = call(loss_input)
for name, value in result.items():
    judge(name, value)
for name, gradient in zip({differentiable}, backward(loss_input, result)):
    judge(f"gradient.{{name}}", gradient)
""",
    "incoming_expanded": """\
loss_input = fresh_input()
output = call(loss_input)[{output!r}]
usual = stored["incoming"]
one_number = usual[:1, :1].clone().to(output).expand_as(output)
(gradient,) = torch.autograd.grad(output, [loss_input.student_hidden], one_number, allow_unused=True)
judge("gradient.student_hidden", gradient.cpu().double() * (usual / usual[:1, :1]).unsqueeze(-1))
""",
    "incoming_transposed": """\
loss_input = fresh_input()
output = call(loss_input)[{output!r}]
incoming = stored["incoming"].to(output).T.contiguous().T
(gradient,) = torch.autograd.grad(output, [loss_input.student_hidden], incoming, allow_unused=True)
judge("gradient.student_hidden", gradient)
""",
    "head_alone": """\
loss_input = fresh_input()
loss_input.student_hidden = loss_input.student_hidden.detach()
output = call(loss_input)[{output!r}]
(gradient,) = torch.autograd.grad(
    output, [loss_input.lm_head_weight], stored["incoming"].to(output), allow_unused=True)
judge("gradient.lm_head_weight", gradient)
""",
    "at_cap": """\
fraction = float(call(fresh_input())["clip_fraction"])
if fraction != 1.0:
    wrong.append(f"clip_fraction: expected 1 for a ratio that equals is_clip, got {{fraction:.7g}}")
""",
    "no_grad": """\
with torch.no_grad():
    result = call(fresh_input())
    for name, value in result.items():
        judge(name, value)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            wrong.append(f"{{name}} carries a graph under no_grad")
""",
    "repeat": """\
runs = []
for _ in range(2):
    loss_input = fresh_input()
    result = call(loss_input)
    runs.append([result[{output!r}].detach(), *(g for g in backward(loss_input, result) if g is not None)])
if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(*runs)):
    wrong.append("two calls on the same input differ")
""",
    "frozen_head": """\
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {{}}))
        name = func.overloadpacket.__name__
        head = tuple(stored["lm_head_weight"].shape)
        if "mm" in name or "_add" in name:
            if isinstance(result, torch.Tensor) and tuple(result.shape[-2:]) in (head, head[::-1]):
                wrong.append(f"{{name}} computes {{tuple(result.shape)}} for a frozen head")
        return result


loss_input = fresh_input()
result = call(loss_input)
with Watch():
    backward(loss_input, result)
if loss_input.lm_head_weight.grad is not None:
    wrong.append("the frozen head received a gradient")
""",
}
BODIES["inference_mode"] = BODIES["no_grad"].replace("no_grad", "inference_mode")


def environment() -> Environment:
    """Templates of this package; an undefined name is an error."""
    return Environment(
        loader=PackageLoader("sdpo_conformance.reproduction"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_reproduction(
    folder: Path,
    key: str,
    target: str,
    device: str,
    requirement: Requirement,
    entry: Capability,
    failure: dict[str, Any],
    case: LossCase,
    other: LossCase | None = None,
) -> str:
    """Write ``key``.py and ``key``.safetensors into ``folder``; the name of the program."""
    expected = expectations(case, entry)
    fields = list(case.tensors())
    output = "divergence" if entry is Capability.DIVERGENCE else "loss"
    body = BODIES[failure["probe"]].format(differentiable=list(case.differentiable), fields=fields, output=output)
    program = (
        environment()
        .get_template("reproduction.py.jinja")
        .render(
            requirement=requirement,
            target=target,
            entry=entry.value,
            failure=failure,
            stem=key,
            device=device,
            layout=case.layout,
            fields=fields,
            differentiable=list(case.differentiable),
            output=output,
            alpha=repr(case.training.alpha),
            is_clip=repr(case.training.is_clip),
            kl_reg_weight=repr(case.training.kl_reg_weight),
            body=body.rstrip(),
            **location(target),
        )
    )
    case.save(folder / f"{key}.safetensors", stored_truth(case, entry, expected, other))
    path = folder / f"{key}.py"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(program, encoding="utf-8")
    os.replace(partial, path)
    return path.name


def stored_truth(
    case: LossCase, entry: Capability, expected: Expectations, other: LossCase | None
) -> dict[str, Tensor]:
    """Truth and bounds, the incoming gradient, and the second input where there is one."""
    tensors = {}
    for kind, group in (("", expected.results), ("gradient.", expected.gradients)):
        for name, expectation in group.items():
            tensors[f"expected.{kind}{name}"] = expectation.value.clone()
            tensors[f"bound.{kind}{name}"] = expectation.bound.clone()
    divergence = entry is Capability.DIVERGENCE
    tensors["incoming"] = divergence_incoming(case) if divergence else torch.tensor(case.incoming)
    for name, tensor in (other or case).tensors().items():
        tensors[f"other.{name}"] = tensor.clone()
    return tensors


def location(target: str) -> dict[str, Any]:
    """How a program without this harness imports ``target``."""
    empty: dict[str, Any] = {"file": "", "defect": "", "module": "", "attribute": []}
    if target.startswith("defect:"):
        return {**empty, "defect": target.removeprefix("defect:")}
    name, _, attribute = target.partition(":")
    parts = attribute.split(".") if attribute else []
    if name.endswith(".py") or "/" in name:
        return {**empty, "file": str(Path(name).resolve()), "attribute": parts}
    bundled = name in BUNDLED or name.startswith("adapters.")
    return {**empty, "module": f"sdpo_implementations.{name}" if bundled else name, "attribute": parts}
