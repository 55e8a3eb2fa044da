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
ENTRY = "compute_response_logprobs"
DEVICE = "cpu"
K = 1
LAYOUT = "contiguous"
OTHER = ""
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


def lay_out(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the memory layout that the failure was seen with."""
    if LAYOUT == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if LAYOUT == "strided" and tensor.dim() > 1:
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if LAYOUT == "sliced" and tensor.dim() > 1:
        return torch.cat([tensor[:, :1], tensor, tensor[:, -1:]], dim=1)[:, 1:-1]
    return tensor


stored: dict[str, torch.Tensor] = {}
wrong: list[str] = []


def judge(name: str, got: torch.Tensor, ids: torch.Tensor) -> None:
    """Compare log-probs (B, T) or (B, T, K) with log_softmax in float64 at these ids, within the stored bound."""
    if got.shape != ids.shape:
        wrong.append(f"{name} has shape {tuple(got.shape)}, expected {tuple(ids.shape)}")
        return
    at = ids.long().cpu().reshape(*stored["expected"].shape[:2], -1)
    if at.numel() and (int(at.min()) < 0 or int(at.max()) >= stored["expected"].shape[-1]):
        wrong.append(f"{name}: an index lies outside the vocabulary")
        return
    truth, bound = (stored[key].gather(-1, at) for key in ("expected", "bound"))
    off = torch.nan_to_num((got.detach().double().cpu().reshape(truth.shape) - truth).abs() / bound, nan=torch.inf)
    if off.numel() and off.max() > 1:
        place = torch.unravel_index(off.argmax(), off.shape)
        shown = [int(index) for index in place]
        value = got.detach().cpu().reshape(truth.shape)[place].item()
        wrong.append(f"{name}{shown}: expected {truth[place].item():.7g}, got {value:.7g}")


def largest(logprobs: torch.Tensor, indices: torch.Tensor) -> None:
    """The indices are K distinct tokens, and no token left out is likelier than the last by more than the bound."""
    k = min(max(1, K), stored["expected"].shape[-1])
    if indices.shape[-1] != k:
        wrong.append(f"{indices.shape[-1]} tokens, expected min(max(1, k), V) = {k}")
        return
    ids = indices.long().cpu()
    if any(len(set(row)) < k for row in ids.reshape(-1, k).tolist()):
        wrong.append("a token stands twice in the support")
    threshold = stored["expected"].topk(k, dim=-1).values[..., -1:]
    slack = stored["bound"].amax(-1, keepdim=True)
    if bool((stored["expected"].gather(-1, ids) < threshold - 2 * slack).any()):
        wrong.append("a token of the support is not among the k largest")


def call(hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> Any:
    """Call the entry."""
    return entry(hidden, head, K) if ENTRY == "compute_teacher_topk" else entry(hidden, head, ids)


def main() -> None:
    """Call it as the failure was seen: ``OTHER`` values in the same tensors before or after, or none."""
    hidden, head, ids = (lay_out(stored[name]).to(DEVICE) for name in ("hidden", "head", "response_ids"))
    if OTHER == "before":
        hidden.copy_(stored["other.hidden"]), head.copy_(stored["other.head"])
        call(hidden, head, ids)
        hidden.copy_(stored["hidden"]), head.copy_(stored["head"])
    elif not OTHER:
        hidden.requires_grad_(), head.requires_grad_()
    returned = call(hidden, head, ids)
    if OTHER == "after":
        hidden.copy_(stored["other.hidden"]), head.copy_(stored["other.head"])
        call(hidden, head, ids)
    logprobs, indices = returned if ENTRY == "compute_teacher_topk" else (returned, ids)
    if logprobs.requires_grad:
        wrong.append("the log-probs carry a graph")
    judge("log-probs", logprobs, indices)
    if ENTRY == "compute_teacher_topk" and not wrong:
        largest(logprobs, indices)
    if OTHER:
        return
    for name, tensor in (("hidden", hidden), ("head", head)):
        if not torch.equal(tensor.detach().cpu(), stored[name]) or not tensor.requires_grad:
            wrong.append(f"{name} was modified")


if __name__ == "__main__":
    entry = implementation()
    stored.update(inputs())
    try:
        main()
    except Exception as error:
        wrong.append(f"raised {type(error).__name__}: {error}")
    print("\n".join(wrong) or "no disagreement: the defect is gone")
    raise SystemExit(bool(wrong))
