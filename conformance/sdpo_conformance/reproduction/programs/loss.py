"""DOCSTRING"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from contextlib import suppress
from dataclasses import make_dataclass
from math import inf  # noqa: F401  (a cap may be infinite)
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
ENTRY = "compute_sdpo_loss"
DEVICE = "cpu"
TRAINING: dict[str, Any] = {"alpha": 0.5, "is_clip": 5.0, "kl_reg_weight": 0.0}
OTHER_TRAINING: dict[str, Any] = {}
FIELDS = ["student_logits"]
ABSENT: list[str] = []
DIFFERENTIABLE = ["student_logits"]
LAYOUT = "contiguous"
OUTPUT = "loss"
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


def lay_out(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The same values in the memory layout that the failure was seen with."""
    if LAYOUT == "transposed" or f"odd:{name}" == LAYOUT:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor
    if LAYOUT == "strided" and tensor.dim() > 1:
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if LAYOUT == "offset" and tensor.dim() > 1 and tensor.shape[0]:
        return torch.cat([tensor[:1], tensor])[1:]
    if LAYOUT == "sliced" and tensor.dim() > 1 and tensor.shape[1]:
        return torch.cat([tensor[:, :1], tensor, tensor[:, -1:]], dim=1)[:, 1:-1]
    if LAYOUT == "expanded" and tensor.shape[0] > 1 and bool((tensor == tensor[:1]).all()):
        return tensor[:1].contiguous().expand_as(tensor)
    return tensor


def record(name: str, fields: dict[str, Any], frozen: bool = True) -> Any:
    """A dataclass with these fields, as the suite hands them over: ``dataclasses.replace`` takes it."""
    return make_dataclass(name, list(fields), frozen=frozen)(**fields)


def fresh_input(prefix: str = "") -> Any:
    """The input as an object with the protocol's fields, fresh tensors; ``other.``: the second input."""
    fields = {name: lay_out(stored[prefix + name].clone().to(DEVICE), name).detach() for name in FIELDS}
    for name in DIFFERENTIABLE:
        fields[name].requires_grad_()
    training = record("Training", OTHER_TRAINING if prefix else TRAINING)
    return record("LossInput", {"training": training, **dict.fromkeys(ABSENT), **fields}, frozen=False)


def call(loss_input: Any) -> Any:
    """Call the entry; a divergence comes back under its name."""
    if ENTRY != "compute_divergence":
        return entry(loss_input)
    support = (loss_input.teacher_logprobs, loss_input.teacher_indices, loss_input.training.alpha)
    return {"divergence": entry(loss_input.student_hidden, loss_input.lm_head_weight, *support)}


def incoming(output: torch.Tensor) -> torch.Tensor:
    """The gradient that arrives at the output."""
    return stored["incoming"].to(output)


def backward(loss_input: Any, result: Any, retain_graph: bool = False) -> tuple[torch.Tensor | None, ...]:
    """The gradients to the differentiable fields."""
    output = result[OUTPUT]
    leaves = [getattr(loss_input, name) for name in DIFFERENTIABLE]
    return torch.autograd.grad(output, leaves, incoming(output), retain_graph=retain_graph, allow_unused=True)


def judge(name: str, got: Any, wider: float = 1.0) -> None:
    """Compare with the truth in float64, elementwise within the stored bound, made ``wider`` by a factor."""
    if f"expected.{name}" not in stored:
        return
    truth, bound = stored[f"expected.{name}"], wider * stored[f"bound.{name}"]
    got = torch.zeros_like(truth) if got is None else torch.as_tensor(got).detach().double().cpu().reshape(truth.shape)
    excess = torch.nan_to_num((got - truth).abs() / bound, nan=torch.inf)
    if excess.numel() and excess.max() > 1:
        worst = torch.unravel_index(excess.argmax(), excess.shape)
        place = [int(index) for index in worst]
        wrong.append(f"{name}{place or ''}: expected {truth[worst].item():.7g}, got {got[worst].item():.7g}")


def judge_all(result: Any, gradients: tuple[torch.Tensor | None, ...] = ()) -> None:
    """Compare every result and gradient."""
    for name, value in result.items():
        judge(name, value)
    for name, gradient in zip(DIFFERENTIABLE, gradients, strict=False):
        judge(f"gradient.{name}", gradient)


def probe_values() -> None:
    """Results and gradients of one call."""
    loss_input = fresh_input()
    result = call(loss_input)
    judge_all(result, backward(loss_input, result))


def probe_ends() -> None:
    """The call, or its backward, ends the process or does not return: it is made in a process of its own."""
    returned = 77  # a status that says that it came to its end
    if "here" in sys.argv:
        loss_input = fresh_input()
        backward(loss_input, call(loss_input))
        raise SystemExit(returned)
    try:
        called = subprocess.run([sys.executable, __file__, "here"], stdout=subprocess.DEVNULL, timeout=60, check=False)
        if called.returncode != returned:
            wrong.append(f"the process ended with status {called.returncode}")
    except subprocess.TimeoutExpired:
        wrong.append("the call did not return within 60 s")


def probe_raises() -> None:
    """The call, or its backward, raises."""
    try:
        loss_input = fresh_input()
        backward(loss_input, call(loss_input))
    except BaseException as error:
        wrong.append(f"raised {type(error).__name__}: {error}")


def probe_refusal() -> None:
    """The call has to raise."""
    try:
        result = call(fresh_input())
    except Exception:
        return
    wrong.append(f"no error: {result}")


def probe_loss_type() -> None:
    """The loss is a 0-dim floating tensor with a graph."""
    loss = call(fresh_input()).get("loss")
    if not (isinstance(loss, torch.Tensor) and loss.is_floating_point() and loss.dim() == 0 and loss.requires_grad):
        wrong.append(f"loss: expected a differentiable 0-dim tensor, got {loss!r}")


def probe_logged() -> None:
    """What is logged is what is trained."""
    result = call(fresh_input())
    loss = float(result["loss"])
    for name in ("logged_distillation_loss", "distillation_loss", "pg_loss"):
        logged = result.get(name, result["loss"])
        eps = torch.finfo(logged.dtype).eps if isinstance(logged, torch.Tensor) else 0.0
        if not abs(loss - float(logged)) <= 2 * stored["bound.loss"].item() + eps * abs(loss):
            wrong.append(f"{name}: expected {loss:.7g}, the loss, got {float(logged):.7g}")


def step_by(shares: str) -> list[str]:
    """What is wrong with the step of the batch in micro-batches of one row, each loss times its share."""
    whole, count = fresh_input(), stored["student_logits"].shape[0]
    rows, results, gradients = [], [], []
    for index in range(count):
        fields = {name: getattr(whole, name)[index : index + 1].detach().clone() for name in FIELDS}
        fields["student_logits"].requires_grad_()
        rows.append(record("LossInput", {"training": whole.training, **dict.fromkeys(ABSENT), **fields}, frozen=False))
        results.append(call(rows[-1]))
        loss = results[-1]["loss"]
        gradients.append(torch.autograd.grad(loss, rows[-1].student_logits, incoming(loss)))
    if shares == "num_valid":
        counts = [float(result["num_valid"]) for result in results]
        weights = [one / max(sum(counts), 1.0) for one in counts]
    else:
        weights = [1.0 if shares == "counts" else 1 / count] * count
    before = len(wrong)
    losses = [one * result["loss"].detach().double() for one, result in zip(weights, results, strict=True)]
    judge("loss", torch.stack(losses).sum(), wider=2.0)
    parts = [one * gradient.double() for one, (gradient,) in zip(weights, gradients, strict=True)]
    judge("gradient.student_logits", torch.cat(parts), wider=2.0)
    found = wrong[before:]
    del wrong[before:]
    return [f"the step of {count} micro-batches: {one}" for one in found]


def probe_cut_by_counts() -> None:
    """Micro-batches that know the counts of the whole batch add up to it."""
    wrong.extend(step_by("counts"))


def probe_cut_by_rows() -> None:
    """Micro-batches of one size, each divided by their number, add up to the batch."""
    wrong.extend(step_by("rows"))


def probe_cut_by_num_valid() -> None:
    """Micro-batches weighted by their positions add up to the batch."""
    wrong.extend(step_by("num_valid"))


def probe_cut_by_counts_or_rows() -> None:
    """Micro-batches add up to the batch, by its counts or by rows."""
    by_counts, by_rows = step_by("counts"), step_by("rows")
    wrong.extend(by_rows if by_counts else [])


def probe_types() -> None:
    """Keys and types of the result."""
    result = call(fresh_input())
    keys = ("loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction")
    if missing := [key for key in keys if key not in result]:
        wrong.append(f"missing keys: {missing}")
    for key, value in result.items():
        tensor = isinstance(value, torch.Tensor)
        if key == "loss" and not (tensor and value.dim() == 0 and value.requires_grad):
            wrong.append(f"loss: expected a differentiable 0-dim tensor, got {value!r}")
        if key != "loss" and (value.dim() > 0 or value.requires_grad if tensor else not isinstance(value, int | float)):
            wrong.append(f"{key}: expected a float or a 0-dim tensor without graph, got {value!r}")


def probe_unmodified() -> None:
    """Inputs are left as they were."""
    loss_input = fresh_input()
    backward(loss_input, call(loss_input))
    for name in FIELDS:
        after = torch.nan_to_num(getattr(loss_input, name).detach().cpu())
        if not torch.equal(after, torch.nan_to_num(stored[name])):
            wrong.append(f"{name} was modified")


def probe_old_gradient() -> None:
    """No gradient reaches old_student_logprobs."""
    loss_input = fresh_input()
    loss_input.old_student_logprobs.requires_grad_()
    result = call(loss_input)
    loss = result["loss"]
    leaves = [getattr(loss_input, name) for name in (*DIFFERENTIABLE, "old_student_logprobs")]
    *gradients, gradient = torch.autograd.grad(loss, leaves, incoming(loss), allow_unused=True)
    judge_all({name: result[name] for name in ("loss", "distill_loss") if name in result}, tuple(gradients))
    if gradient is not None and gradient.any():
        wrong.append(f"old_student_logprobs receives a gradient, up to {gradient.abs().max().item():.7g}")


def probe_no_gradient() -> None:
    """Where nothing counts the gradient is zeros, not none."""
    loss_input = fresh_input()
    gradients = backward(loss_input, call(loss_input))
    if any(gradient is None for gradient in gradients):
        wrong.append(f"no gradient reaches {', '.join(DIFFERENTIABLE)}")


def probe_frozen_inputs() -> None:
    """Only the differentiable fields ask for and receive gradients."""
    loss_input = fresh_input()
    output = call(loss_input)[OUTPUT]
    output.backward(incoming(output))
    for name in FIELDS:
        tensor = getattr(loss_input, name)
        if name not in DIFFERENTIABLE and (tensor.requires_grad or tensor.grad is not None):
            wrong.append(f"{name} requires grad or received one")


def probe_two_graphs() -> None:
    """Other graphs alive, as many as a batch has samples, do not change the first."""
    first = fresh_input()
    result = call(first)
    alive = [call(fresh_input("other.")) for _ in range(32)]
    for other in reversed(alive):
        other[OUTPUT].sum().backward()
    judge_all(result, backward(first, result))


def probe_from_model() -> None:
    """Logits or hidden states are a slice of what a model returned, the head is its parameter."""
    name = DIFFERENTIABLE[0]
    loss_input = fresh_input()
    leaf = getattr(loss_input, name)
    returned = torch.cat([leaf[:, :1], leaf, leaf[:, -1:]], dim=1)
    setattr(loss_input, name, returned[:, 1:-1])
    if "lm_head_weight" in FIELDS:
        head = loss_input.lm_head_weight
        loss_input.lm_head_weight = torch.nn.Parameter(head.detach(), head.requires_grad)
    output = (result := call(loss_input))[OUTPUT]
    leaves = [leaf if one == name else getattr(loss_input, one) for one in DIFFERENTIABLE]
    judge_all(result, torch.autograd.grad(output, leaves, incoming(output), allow_unused=True))
    if not torch.equal(returned[:, 1:-1].detach().cpu(), stored[name]):
        wrong.append(f"{name} was modified")


def probe_after_error() -> None:
    """A call that raised leaves nothing behind."""
    failing = fresh_input()
    failing.teacher_logprobs = None
    with suppress(Exception):
        call(failing)
    loss_input = fresh_input()
    result = call(loss_input)
    judge_all(result, backward(loss_input, result))


def probe_after_evaluation() -> None:
    """Calls without gradients leave nothing behind, at a shape that was trained on before either."""
    for _ in range(2):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                call(fresh_input())
        try:
            loss_input = fresh_input()
            result = call(loss_input)
            gradients = backward(loss_input, result)
        except Exception as error:
            wrong.append(f"after calls without gradients: raised {type(error).__name__}: {error}")
            return
        judge_all(result, gradients)


def probe_accumulate() -> None:
    """Gradients of two calls add up."""
    loss_input = fresh_input()
    for _ in range(2):
        output = call(loss_input)[OUTPUT]
        output.backward(incoming(output))
    for name in DIFFERENTIABLE:
        gradient = getattr(loss_input, name).grad
        judge(f"gradient.{name}", None if gradient is None else gradient / 2)


def probe_backward_twice() -> None:
    """A second backward through a retained graph gives the same gradient."""
    loss_input = fresh_input()
    result = call(loss_input)
    backward(loss_input, result, retain_graph=True)
    judge_all({}, backward(loss_input, result))


def probe_changed_in_place() -> None:
    """Inputs changed in place between two calls are read anew."""
    loss_input = fresh_input("other.")
    backward(loss_input, call(loss_input))
    with torch.no_grad():
        for name in FIELDS:
            getattr(loss_input, name).copy_(stored[name])
    loss_input.training = record("Training", TRAINING)
    result = call(loss_input)
    judge_all(result, backward(loss_input, result))


def probe_options_changed() -> None:
    """Options changed in place between two calls are read anew."""
    before = fresh_input("other.")
    backward(before, call(before))
    vars(before.training).update(TRAINING)
    loss_input = fresh_input()
    loss_input.training = before.training
    result = call(loss_input)
    judge_all(result, backward(loss_input, result))


def probe_incoming_expanded() -> None:
    """An incoming gradient that is one number expanded."""
    loss_input = fresh_input()
    output = call(loss_input)[OUTPUT]
    usual = stored["incoming"]
    one_number = usual[:1, :1].clone().to(output).expand_as(output)
    (gradient,) = torch.autograd.grad(output, [loss_input.student_hidden], one_number)
    judge("gradient.student_hidden", gradient.cpu().double() * (usual / usual[:1, :1]).unsqueeze(-1))


def probe_incoming_transposed() -> None:
    """An incoming gradient that is not contiguous."""
    loss_input = fresh_input()
    output = call(loss_input)[OUTPUT]
    arriving = incoming(output).T.contiguous().T
    (gradient,) = torch.autograd.grad(output, [loss_input.student_hidden], arriving, allow_unused=True)
    judge("gradient.student_hidden", gradient)


def probe_head_alone() -> None:
    """Only the head asks for a gradient."""
    loss_input = fresh_input()
    loss_input.student_hidden = loss_input.student_hidden.detach()
    output = call(loss_input)[OUTPUT]
    (gradient,) = torch.autograd.grad(output, [loss_input.lm_head_weight], incoming(output), allow_unused=True)
    judge("gradient.lm_head_weight", gradient)


def probe_at_cap() -> None:
    """A ratio that equals the cap counts as clipped."""
    fraction = float(call(fresh_input())["clip_fraction"])
    if fraction != 1.0:
        wrong.append(f"clip_fraction: expected 1 for a ratio that equals is_clip, got {fraction:.7g}")


def without_graph(result: Any) -> None:
    """Results are right and carry no graph."""
    for name, value in result.items():
        judge(name, value)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            wrong.append(f"{name} carries a graph")


def probe_no_grad() -> None:
    """Under no_grad."""
    with torch.no_grad():
        without_graph(call(fresh_input()))


def probe_inference_mode() -> None:
    """Under inference_mode."""
    with torch.inference_mode():
        without_graph(call(fresh_input()))


def probe_repeat() -> None:
    """Two calls on the same input agree to the last bit."""
    runs = []
    for _ in range(2):
        loss_input = fresh_input()
        result = call(loss_input)
        gradients = backward(loss_input, result)
        runs.append([result[OUTPUT].detach(), *(one for one in gradients if one is not None)])
    if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(*runs, strict=True)):
        wrong.append("two calls on the same input differ")


def probe_frozen_head() -> None:
    """No gradient of a frozen head is computed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            head = tuple(stored["lm_head_weight"].shape)
            product = ("mm" in name or "_add" in name) and isinstance(result, torch.Tensor)
            if product and tuple(result.shape[-2:]) in (head, head[::-1]):
                wrong.append(f"{name} computes {tuple(result.shape)} for a frozen head")
            return result

    loss_input = fresh_input()
    result = call(loss_input)
    with Watch():
        backward(loss_input, result)
    if loss_input.lm_head_weight.grad is not None:
        wrong.append("the frozen head received a gradient")


if __name__ == "__main__":
    entry = implementation()
    stored.update(inputs())
    probe_values()
    print("\n".join(wrong) or "no disagreement: the defect is gone")
    raise SystemExit(bool(wrong))
