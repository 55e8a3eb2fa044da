"""Conditional mutants: right code that goes wrong only where a predicate holds, and what the suite makes of them.

``python -m tests.evidence.conditional_mutants reach --profile quick`` says which predicates a profile visits;
``… kill --profile quick --kind trainer`` judges a mutant of each and prints the survivors; exit status 1 where there
are any. A predicate that is visited is where its mutant goes wrong, so a survivor is either not visited or not visible.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from tests.evidence.predicates import CALLS, FUSED, HEADS, IDS, INCOMING, LOSS, SAMPLES, Call, InBatch, K, leading
from tests.evidence.processes import in_processes

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.profiles import PROFILES
from sdpo_conformance.protocol import Capability, Claims
from sdpo_conformance.specs import find_spec
from sdpo_implementations import reference

Function = Callable[..., Any]
DTYPES = ("float32", "bfloat16", "float16")

# --- trainers ---


class Calls:
    """Counts the calls on each model."""

    def __init__(self) -> None:
        self.count: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.last: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.total = 0

    def of(self, model: Any, samples: Any, training: Any) -> Call:
        before = self.count.get(model, 0)
        since = self.total - self.last.get(model, self.total)
        self.total += 1
        self.count[model], self.last[model] = before + 1, self.total
        return Call(model, tuple(samples), training, before, since)


def wrong_call(predicate: Callable[[Call], bool]) -> Function:
    """The anchor weighs 0.5 more where the predicate holds."""
    calls = Calls()

    def distill(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        if predicate(calls.of(model, samples, training)):
            training = replace(training, kl_reg_weight=training.kl_reg_weight + 0.5)
        return reference.distill(model, samples, training, optimizer_cls)

    return distill


def wrong_sample(predicate: Callable[[InBatch], bool]) -> Function:
    """The recorded log-probs of a sample are 0.9 nats off where the predicate holds."""
    calls = Calls()

    def distill(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        call = calls.of(model, samples, training)
        changed = [
            replace(one, response_logprobs=[r + 0.9 for r in one.response_logprobs])
            if one.response_logprobs
            and one.response_token_ids
            and one.prompt_token_ids
            and one.teacher_prompt_token_ids
            and predicate(InBatch(one, call, index))
            else one
            for index, one in enumerate(samples)
        ]
        return reference.distill(model, changed, training, optimizer_cls)

    return distill


def leaving(act: Callable[[Any], object]) -> Function:
    """A right trainer that leaves something behind."""

    def distill(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
        found = reference.distill(model, samples, training, optimizer_cls)
        act(model)
        return found

    return distill


def adapter(model: Any) -> Iterator[torch.nn.Parameter]:
    return (p for name, p in model.named_parameters() if "lora_" in name)


def frozen(model: Any) -> torch.nn.Parameter:
    return next(p for p in model.parameters() if not p.requires_grad)


def scale_lora(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling.update({key: value * 1.5 for key, value in module.scaling.items()})


LEFT: Mapping[str, Callable[[Any], object]] = {
    "the adapter frozen": lambda m: [p.requires_grad_(False) for p in adapter(m)],
    "one adapter weight frozen": lambda m: next(adapter(m)).requires_grad_(False),
    "a base weight trainable": lambda m: frozen(m).requires_grad_(True),
    "evaluation mode": lambda m: m.eval(),
    "one module in evaluation mode": lambda m: next(iter(m.get_base_model().children())).eval(),
    "a hook that changes the output": lambda m: m.get_output_embeddings().register_forward_hook(lambda *a: a[2] * 1.01),
    "a hook that does nothing": lambda m: m.get_base_model().register_forward_hook(lambda *a: None),
    "a hook before forward": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "a hook on a parameter": lambda m: next(adapter(m)).register_hook(lambda g: g * 2),
    "a gradient on the base": lambda m: setattr(frozen(m), "grad", torch.zeros_like(frozen(m))),
    "the random state seeded": lambda m: torch.manual_seed(0),
    "grad mode off": lambda m: torch.set_grad_enabled(False),
    "float64 as default": lambda m: torch.set_default_dtype(torch.float64),
    "numpy's random state seeded": lambda m: numpy.random.seed(0),
    "Python's random state seeded": lambda m: random.seed(0),
    "deterministic algorithms on": lambda m: torch.use_deterministic_algorithms(True),
    "products of float32 in bfloat16": lambda m: torch.set_float32_matmul_precision("medium"),
    "the adapter in float64": lambda m: [setattr(p, "data", p.data.double()) for p in adapter(m)],
    "anomaly detection on": lambda m: torch.autograd.set_detect_anomaly(True),
    "LoRA scaled": scale_lora,
    "the adapter disabled": lambda m: m.base_model.disable_adapter_layers(),
    "the adapter merged": lambda m: m.merge_adapter(),
}


def sorting(model: Any, samples: Any, training: Any, optimizer_cls: Any) -> Any:
    """A right trainer that leaves the caller's list in another order."""
    found = reference.distill(model, list(samples), training, optimizer_cls)
    samples.reverse()
    return found


# --- losses and heads ---


def wrong_loss(entry: str, predicate: Callable[[Any], bool]) -> Function:
    """Behaviour and base log-probs are 0.3 nats off where the predicate holds."""
    right: Function = getattr(reference, entry)

    def loss(x: Any) -> Any:
        if predicate(x):
            old, base = x.old_student_logprobs - 0.3, x.base_logprobs - 0.3
            weights = replace(x.training, is_clip=x.training.is_clip * 0.9)
            x = replace(x, old_student_logprobs=old, base_logprobs=base, training=weights)
        return right(x)

    return loss


def wrong_backward(entry: str, predicate: Callable[[Any], bool]) -> Function:
    """The gradient is 1.05 times what it should be, or 0.05 beside it, where what arrives fulfils the predicate."""
    right: Function = getattr(reference, entry)

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, arriving: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return arriving * 1.05 + 0.05 if predicate(arriving) else arriving

    def loss(x: Any) -> Any:
        found = dict(right(x))
        found["loss"] = Changed.apply(found["loss"])
        return found

    return loss


def wrong_gradient(entry: str, predicate: Callable[[Any], bool]) -> Function:
    """The values are right, the gradient is 1.05 times what it should be where the predicate holds."""
    right: Function = getattr(reference, entry)

    def loss(x: Any) -> Any:
        found = dict(right(x))
        if predicate(x) and found["loss"].requires_grad:
            found["loss"] = found["loss"] + 0.05 * (found["loss"] - found["loss"].detach())
        return found

    return loss


class Remembering:
    """A loss that is wrong, or raises, for what an earlier call was like."""

    def __init__(self, before: Callable[[Any], object], now: Callable[[Any, set[object]], bool]) -> None:
        self.before, self.now = before, now
        self.seen: set[object] = set()

    def __call__(self, x: Any) -> Any:
        wrong = self.now(x, self.seen)
        self.seen.add(self.before(x))
        found = dict(reference.compute_sdpo_loss(x))
        if wrong:
            found["loss"] = found["loss"] * 1.05
        return found


def after_an_error() -> Function:
    """Wrong at the call after one that raised."""
    raised = False

    def loss(x: Any) -> Any:
        nonlocal raised
        wrong, raised = raised, True
        found = dict(reference.compute_sdpo_loss(x))
        raised = False
        if wrong:
            found["loss"] = found["loss"] * 1.05
        return found

    return loss


def shape_of(x: Any) -> tuple[object, ...]:
    return (*leading(x).shape, x.teacher_indices.shape[-1])


def made_without_gradient(x: Any) -> object:
    """The shape of a call without gradients, which a cache by shape would remember."""
    return ("made", shape_of(x)) if not torch.is_grad_enabled() else ("used", shape_of(x))


def after_evaluation(x: Any, seen: set[object]) -> bool:
    return ("made", shape_of(x)) in seen and ("used", shape_of(x)) not in seen and torch.is_grad_enabled()


def changing(act: Callable[[], object]) -> Function:
    """A right loss that leaves the process changed."""

    def loss(x: Any) -> Any:
        found = reference.compute_sdpo_loss(x)
        act()
        return found

    return loss


def changing_in_backward(act: Callable[[], object]) -> Function:
    """A right loss whose backward leaves the process changed."""

    def loss(x: Any) -> Any:
        found = dict(reference.compute_sdpo_loss(x))
        if found["loss"].requires_grad:
            found["loss"] = found["loss"] * 1.0
            found["loss"].register_hook(lambda g: (act(), g)[1])
        return found

    return loss


PROCESS: Mapping[str, Callable[[], object]] = {
    "the random state seeded": lambda: torch.manual_seed(0),
    "numpy's random state seeded": lambda: numpy.random.seed(0),
    "Python's random state seeded": lambda: random.seed(0),
    "grad mode off": lambda: torch.set_grad_enabled(False),
    "float64 as default": lambda: torch.set_default_dtype(torch.float64),
    "another number of threads": lambda: torch.set_num_threads(3),
    "autocast on": lambda: torch.set_autocast_enabled("cpu", True),
    "anomaly detection on": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms on": lambda: torch.use_deterministic_algorithms(True),
}
"""What a loss may leave behind."""


def wrong_scores(predicate: Callable[[Any], bool]) -> Function:
    def response_logprobs(hidden: Any, head: Any, ids: Any) -> Any:
        found = reference.compute_response_logprobs(hidden, head, ids)
        return found - 0.1 if predicate((hidden, head, ids)) else found

    return response_logprobs


def wrong_topk(predicate: Callable[[Any], bool]) -> Function:
    def teacher_topk(hidden: Any, head: Any, k: int) -> Any:
        values, indices = reference.compute_teacher_topk(hidden, head, k)
        return (values - 0.1 if predicate((hidden, head, k)) else values), indices

    return teacher_topk


def mutants(kind: str) -> dict[str, tuple[Capability, Function]]:
    """Name -> entry and wrong function."""
    found: dict[str, tuple[Capability, Function]] = {}
    if kind == "trainer":
        found |= {f"call: {name}": (Capability.DISTILL, wrong_call(p)) for name, p in CALLS.items()}
        found |= {f"sample: {name}": (Capability.DISTILL, wrong_sample(p)) for name, p in SAMPLES.items()}
        found |= {f"left behind: {name}": (Capability.DISTILL, leaving(act)) for name, act in LEFT.items()}
        found["left behind: the samples in another order"] = (Capability.DISTILL, sorting)
    elif kind == "loss":
        found |= {f"loss: {name}": (Capability.LOSS, wrong_loss("compute_sdpo_loss", p)) for name, p in LOSS.items()}
        found |= {name: (Capability.LOSS, wrong_backward("compute_sdpo_loss", p)) for name, p in INCOMING.items()}
        found |= {f"gradient: {n}": (Capability.LOSS, wrong_gradient("compute_sdpo_loss", p)) for n, p in LOSS.items()}
        found |= {f"left behind: {name}": (Capability.LOSS, changing(act)) for name, act in PROCESS.items()}
        found |= {f"left by backward: {n}": (Capability.LOSS, changing_in_backward(a)) for n, a in PROCESS.items()}
        found["after a call that raised"] = (Capability.LOSS, after_an_error())
        found["after an evaluation"] = (Capability.LOSS, Remembering(made_without_gradient, after_evaluation))
    elif kind == "fused":
        entry, name = Capability.FUSED, "compute_fused_sdpo_loss"
        found |= {f"fused: {words}": (entry, wrong_loss(name, p)) for words, p in FUSED.items()}
        found |= {f"fused gradient: {words}": (entry, wrong_gradient(name, p)) for words, p in FUSED.items()}
    else:
        found |= {f"log-probs: {n}": (Capability.RESPONSE_LOGPROBS, wrong_scores(p)) for n, p in HEADS.items()}
        found |= {f"log-probs: {n}": (Capability.RESPONSE_LOGPROBS, wrong_scores(p)) for n, p in IDS.items()}
        found |= {f"top-k: {n}": (Capability.TEACHER_TOPK, wrong_topk(p)) for n, p in {**HEADS, **K}.items()}
    return found


KINDS = ("trainer", "loss", "fused", "head")


def first_failure(
    entry: Capability, function: Function, profile: str, families: tuple[str, ...] = ()
) -> tuple[str, str] | None:
    """The first MUST that a mutant fails, and what it says; of these ``families`` alone, if any are named."""
    dtypes = DTYPES[:2] if entry is Capability.DISTILL else DTYPES
    implementation = SimpleNamespace(**{entry.value: function})
    subject = Subject(implementation, entry, Claims(), PROFILES[profile], dtypes=dtypes)
    for requirement in find_spec("claas").requirements().values():
        if entry not in requirement.capabilities or requirement.level != "MUST":
            continue
        if families and requirement.family not in families:
            continue
        try:
            subject.run(requirement)
        except (Disagreement, ImplementationError) as failure:
            return requirement.id, str(failure)
        except pytest.skip.Exception:
            continue
    return None


def visited(kind: str, profile: str) -> dict[str, bool]:
    """Which predicates hold in at least one call, from one run of right code that takes notes."""
    seen: dict[str, bool] = {}

    def noting(name: str, predicate: Callable[[Any], bool]) -> Callable[[Any], bool]:
        seen.setdefault(name, False)

        def note(x: Any) -> bool:
            seen[name] = seen[name] or bool(predicate(x))
            return False

        return note

    def all_of(prefix: str, table: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
        notes = [noting(prefix + name, predicate) for name, predicate in table.items()]
        return lambda x: sum(note(x) for note in notes) > 0  # every note is taken

    runs: list[tuple[Capability, Function]] = []
    if kind == "trainer":
        runs.append((Capability.DISTILL, wrong_call(all_of("call: ", CALLS))))
        runs.append((Capability.DISTILL, wrong_sample(all_of("sample: ", SAMPLES))))
    elif kind == "loss":
        runs.append((Capability.LOSS, wrong_loss("compute_sdpo_loss", all_of("loss: ", LOSS))))
        runs.append((Capability.LOSS, wrong_backward("compute_sdpo_loss", all_of("", INCOMING))))
    elif kind == "fused":
        runs.append((Capability.FUSED, wrong_loss("compute_fused_sdpo_loss", all_of("fused: ", FUSED))))
    else:
        runs.append((Capability.RESPONSE_LOGPROBS, wrong_scores(all_of("log-probs: ", {**HEADS, **IDS}))))
        runs.append((Capability.TEACHER_TOPK, wrong_topk(all_of("top-k: ", {**HEADS, **K}))))
    for entry, function in runs:
        if (failure := first_failure(entry, function, profile)) is not None:
            raise AssertionError(f"right code was accused: {failure}")
    return seen


def kill(
    kind: str, profile: str, names: Iterable[str] | None = None, families: tuple[str, ...] = ()
) -> dict[str, tuple[str, str] | None]:
    """Each mutant's first failure, or None: it survived."""
    from sdpo_conformance.specs.claas.step_loop import explanations, gradients
    from sdpo_conformance.trainer import observation

    found: dict[str, tuple[str, str] | None] = {}
    # a verdict needs no name for the mistake, and looking for one takes longer than judging
    with patch.object(gradients, "explain", lambda *_: explanations.Explained()):
        for name, (entry, function) in mutants(kind).items():
            if names is None or name in names:
                found[name] = first_failure(entry, function, profile, families)
                observation._KEPT.clear()
                gc.collect()
    return found


Task = tuple[str, str, str]
"""kind, profile, name"""


def judge(task: Task) -> tuple[str, tuple[str, str] | None]:
    """A mutant's name and first failure."""
    torch.set_num_threads(1)
    kind, profile, name = task
    return name, kill(kind, profile, [name])[name]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.evidence.conditional_mutants")
    parser.add_argument("what", choices=("reach", "kill"))
    parser.add_argument("--profile", choices=sorted(PROFILES), default="quick")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--match", default="", help="only mutants whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="processes that judge mutants")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    left = 0
    for kind in options.kind or KINDS:
        started = time.monotonic()
        if options.what == "reach":
            seen = visited(kind, options.profile)
            missing = [name for name, hit in seen.items() if not hit]
            total = len(seen)
        else:
            chosen = [name for name in mutants(kind) if options.match in name]
            missing, total = [], len(chosen)
            for name, outcome in in_processes(judge, [(kind, options.profile, name) for name in chosen], options.jobs):
                print(f"{name}: {outcome[0] if outcome else 'SURVIVES'}", flush=True)
                missing += [] if outcome else [name]
        left += len(missing)
        word = "visited" if options.what == "reach" else "killed"
        print(f"{kind}, {options.profile}: {total - len(missing)} of {total} {word}, ", end="")
        print(f"{time.monotonic() - started:.0f} s; not: {'; '.join(missing) or 'none'}", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
