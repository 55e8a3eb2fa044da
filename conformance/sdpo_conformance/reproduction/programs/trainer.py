"""DOCSTRING"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import make_dataclass, replace
from math import inf, nan  # noqa: F401 - sampler log-probs below may name them
from pathlib import Path
from typing import Any, NoReturn

try:
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file
except ImportError as error:
    print(f"could not run: {error}", file=sys.stderr)
    raise SystemExit(125) from None

# filled in: begin
TARGET: dict[str, Any] = {"module": "mypkg.loss", "file": "", "attribute": [], "defect": "", "search": []}
ENTRY = "distill"
DEVICE = "cpu"
SEED = 0
DTYPE = "float32"
CONFIG_CLASS = "LlamaConfig"
MODEL_CLASS = "LlamaForCausalLM"
CONFIG: dict[str, Any] = {}
ADAPTER = "default"
ADAPTERS: dict[str, dict[str, Any]] = {}
ATTENTION = "eager"
CHECKPOINTING: dict[str, Any] = {}
TRAINING: dict[str, Any] = {}
SAMPLES: list[dict[str, Any]] = []
HISTORY: list[str] = []
STEP = 1
METRIC = ""
TRUTH = 0.0
BOUND = 0.0
BOUNDS: dict[str, float] = {}
SETTINGS: dict[str, Any] = {}
# filled in: end

Named = Iterable[tuple[str, torch.Tensor | None]]


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


def copies(named: Named) -> dict[str, torch.Tensor]:
    """Detached copies on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in named if value is not None}


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter that takes a gradient."""
    return copies((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def build() -> Any:
    """``made``; exits with 125 where this transformers or peft cannot build that model."""
    try:
        return made()
    except Exception as error:
        could_not_run(error)


def made() -> Any:
    """The model with its adapter, weights as stored."""
    config = getattr(transformers, CONFIG_CLASS)(**CONFIG)
    config._attn_implementation = ATTENTION
    base = getattr(transformers, MODEL_CLASS)(config).to(getattr(torch, DTYPE))
    (first, arguments), *more = ADAPTERS.items()
    model: Any = peft.get_peft_model(base, peft.LoraConfig(**arguments), adapter_name=first)
    for name, arguments in more:
        model.add_adapter(name, peft.LoraConfig(**arguments))
    model.set_adapter(ADAPTER)  # the others are not active
    weights = {name.removeprefix("model."): value for name, value in stored.items() if name.startswith("model.")}
    model.load_state_dict(weights)
    if CHECKPOINTING:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(CHECKPOINTING)
    return model.to(DEVICE).train()


class Recording:
    """What a trainer handed to its optimizer, and what came of it."""

    def __init__(self, model: Any) -> None:
        self.start = adapter(model)
        self.frozen = copies((name, p) for name, p in model.named_parameters() if not p.requires_grad)
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.groups: list[dict[str, Any]] = []

    def optimizer_cls(self) -> type[torch.optim.AdamW]:
        """AdamW that writes into this."""
        recording = self

        class RecordingAdamW(torch.optim.AdamW):
            def step(self, closure: Callable[[], float] | None = None) -> Any:
                loss = closure() if closure is not None else None
                stepped = [p for group in self.param_groups for p in group["params"]]
                named = [(recording.names.get(id(p), "?"), p) for p in stepped]
                recording.gradients.append(copies((name, p.grad) for name, p in named))
                recording.groups.extend(self.param_groups)
                super().step()
                recording.weights.append(copies(named))
                return loss

        return RecordingAdamW


Sample = make_dataclass("Sample", SAMPLES[0] if SAMPLES else (), frozen=True)
Training = make_dataclass("Training", TRAINING, frozen=True)


def prepare() -> tuple[Any, list[Any], Any]:
    """Model, samples and training, the trainer's earlier calls made."""
    torch.manual_seed(SEED)
    model, training = build(), Training(**TRAINING)
    samples = [Sample(**copy.deepcopy(sample)) for sample in SAMPLES]
    torch.manual_seed(SEED)
    for call in HISTORY:
        on, batch = model, copy.deepcopy(samples)
        if call == "same":
            recorded = [sample.response_logprobs for sample in batch]
            shifted = [old and [r - 0.5 for r in old] for old in recorded]
            batch = [replace(one, response_logprobs=old) for one, old in zip(batch, shifted, strict=True)]
        if call == "another":
            on = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in on.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                    parameter.grad = None
        entry(on, batch, training, torch.optim.AdamW)
    torch.manual_seed(SEED)
    return model, samples, training


def run() -> tuple[Any, list[Any], Recording, list[dict[str, Any]]]:
    """One call: the model after it, the samples, the recording, the metrics."""
    model, samples, training = prepare()
    recording = Recording(model)
    metrics = entry(model, samples, training, recording.optimizer_cls())["per_step_metrics"]
    return model, samples, recording, list(metrics)


def probe_refusal() -> None:
    """A bad batch is refused with an error, and nothing changes."""
    model, samples, training = prepare()
    recording = Recording(model)
    try:
        entry(model, samples, training, recording.optimizer_cls())
        wrong.append("expected a ValueError, got no error")
    except Exception as error:
        if not isinstance(error, ValueError):
            wrong.append(f"expected a ValueError, got {type(error).__name__}: {error}")
    now = adapter(model)
    if any(not torch.equal(now[name], before) for name, before in recording.start.items()):
        wrong.append("the adapter changed")


def probe_gradient() -> None:
    """The gradient handed to the optimizer at one step."""
    recording = run()[2]
    for name, bound in BOUNDS.items():
        truth = stored[f"expected.gradient.{name}"]
        got = recording.gradients[STEP - 1].get(name, torch.zeros_like(truth)).double()
        off = (got - truth).norm().item()
        if not off <= bound:
            wrong.append(f"gradient of {name} at step {STEP}: {off:.4g} from the truth, allowed {bound:.4g}")


def probe_metric() -> None:
    """One metric of one step."""
    got = float(run()[3][STEP - 1][METRIC])
    if not abs(got - TRUTH) <= BOUND:
        wrong.append(f"{METRIC} of step {STEP}: expected {TRUTH}, got {got!r}")


def probe_state() -> None:
    """What the trainer owes back: frozen weights, samples, the adapter enabled and not merged."""
    model, samples, recording, _ = run()
    now = dict(model.named_parameters())
    wrong.extend(
        f"{name} changed"
        for name, before in recording.frozen.items()
        if not torch.equal(now[name].detach().cpu(), before)
    )
    if samples != [Sample(**sample) for sample in SAMPLES]:
        wrong.append("the samples changed")
    if model.get_model_status().enabled is not True:
        wrong.append("the adapter is left disabled")
    if model.get_model_status().merged_adapters:
        wrong.append("the adapter is left merged")


def probe_update() -> None:
    """AdamW with the settings of the spec, once per step, on the recorded gradients."""
    model, _, recording, _ = run()
    for group in recording.groups:
        for key, value in SETTINGS.items():
            got = list(group[key]) if isinstance(value, list) else group[key]
            if got != value:
                wrong.append(f"AdamW's {key}: expected {value}, got {got}")
    steps, rate = TRAINING["steps_per_batch"], TRAINING["learning_rate"]
    if len(recording.weights) != steps:
        wrong.append(f"{len(recording.weights)} optimizer steps, expected {steps}")
    replayed = {name: torch.nn.Parameter(value.clone()) for name, value in recording.start.items()}
    optimizer = torch.optim.AdamW(replayed.values(), lr=rate, weight_decay=SETTINGS["weight_decay"])
    for gradient in recording.gradients:
        for name, parameter in replayed.items():
            parameter.grad = gradient.get(name)
        optimizer.step()
    now = dict(model.named_parameters())
    for name, parameter in replayed.items():
        off = (now[name].detach().cpu() - parameter.detach()).abs().max().item()
        if off > 1e-2 * rate:
            wrong.append(f"{name}: AdamW on the recorded gradients leads {off:.4g} away from where it is")


def probe_run() -> None:
    """The metrics of every step, complete and fresh."""
    metrics = run()[3]
    if len(metrics) != TRAINING["steps_per_batch"]:
        wrong.append(f"{len(metrics)} entries of per_step_metrics, expected {TRAINING['steps_per_batch']}")
    keys = ("step", "total_loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction", "grad_norm")
    for number, one in enumerate(metrics, start=1):
        wrong.extend(f"step {number} has no {key}" for key in keys if key not in one)
        if one.get("step") != number:
            wrong.append(f"entry {number} says step {one.get('step')}")
        if number > 1 and all(one.get(key) == metrics[number - 2].get(key) for key in keys[1:4]):
            wrong.append(f"steps {number - 1} and {number} report bit-identical losses")


if __name__ == "__main__":
    entry = implementation()
    stored.update(inputs())
    probe_run()
    print("\n".join(wrong) or "no disagreement: the defect is gone")
    raise SystemExit(bool(wrong))
