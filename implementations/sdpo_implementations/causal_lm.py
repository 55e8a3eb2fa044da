"""Reading a causal language model wrapped by PEFT: logits or hidden states at a response, and its state.

Positions: the logits (or hidden states) at position t predict token t + 1, so a response of T tokens after a
prompt of P is read at positions P-1 .. P+T-2. Only those positions go through the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.shared_forward import SharedForward


@dataclass(frozen=True)
class HeadInput:
    """``hidden`` (1, N, H) and ``head_weight`` (V, H): the logits are ``hidden @ head_weight.T``."""

    hidden: Tensor
    head_weight: Tensor


SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "logit_softcap")
"""Names under which configs keep a softcap on the output logits (Gemma 2 and later, among others)."""

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Constants the output logits are multiplied by (Cohere; Falcon-H1)."""

DIVISORS = ("logits_scaling",)
"""Constants the output logits are divided by (Granite)."""


def response_logits(model: Any, input_ids: Tensor, response_length: int) -> Tensor:
    """(1, T, V): the model's own logits at the response, whatever its head does. ``input_ids`` (1, P + T)."""
    # the last response token predicts nothing: one position more than needed is asked for and dropped
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=response_length + 1).logits
    else:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, -response_length - 1 :]
    return logits[:, :-1]


def response_hidden(model: Any, forward: SharedForward) -> HeadInput:
    """The last hidden states at the responses, (1, N, H), and the head's weight, the head's constant factor
    folded into the hidden states. Only for models that ``require_linear_head`` accepts."""
    language_model = model.get_base_model()
    decoder = getattr(language_model, language_model.base_model_prefix)
    states = decoder(input_ids=forward.input_ids, use_cache=False, **forward.arguments).last_hidden_state
    return head_input(language_model, forward.at_responses(states))


def head_input(language_model: Any, hidden: Tensor) -> HeadInput:
    factor = head_factor(language_model.config)
    head_weight = language_model.get_output_embeddings().weight
    return HeadInput(hidden if factor == 1 else hidden * factor, head_weight)


def head_factor(config: Any) -> float:
    """The constant between ``hidden @ head_weight.T`` and the logits."""
    text_config = config.get_text_config()
    factor = 1.0
    for name in MULTIPLIERS:
        factor *= getattr(text_config, name, None) or 1.0
    for name in DIVISORS:
        factor /= getattr(text_config, name, None) or 1.0
    return factor


INSTEAD = "distil from logits instead (sdpo_implementations.reference)"


def require_linear_head(model: Any, input_ids: Tensor) -> None:
    """Raise ValueError unless the model's logits are its last hidden states times one weight matrix, and unless
    a token's states depend on the tokens up to it alone.

    What PEFT puts before the prompt or on the head, a softcap and a bias are refused by name; everything else
    (an unknown multiplier, a look ahead) by what one forward of a few tokens shows. ``input_ids`` (1, L).
    """
    language_model = model.get_base_model()
    kind = type(language_model).__name__
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ValueError(f"{type(model.active_peft_config).__name__} puts virtual tokens before the prompt; {INSTEAD}")
    config = language_model.config.get_text_config()
    if capped := next((name for name in SOFTCAPS if getattr(config, name, None)), None):
        raise ValueError(f"{kind} caps its output logits ({capped}): they are not hidden @ head.T; {INSTEAD}")
    head = language_model.get_output_embeddings()
    if head is None or not hasattr(language_model, language_model.base_model_prefix):
        raise ValueError(f"{kind} has no decoder with a linear output head; {INSTEAD}")
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"the output head of {kind} is {_described(head)}: logits are not hidden @ head.T; {INSTEAD}")
    if head.bias is not None:
        raise ValueError(f"the output head of {kind} has a bias: logits are not hidden @ head.T; {INSTEAD}")
    _probe(model, language_model, input_ids[:, :PROBED])


PROBED = 8
"""Tokens of the probe."""


def _described(head: Any) -> str:
    """What stands in the place of a plain linear head."""
    module = type(head).__module__
    name = f"{module.rpartition('.')[2]}.{type(head).__name__}"
    if hasattr(head, "modules_to_save"):
        return f"a copy trained whole (modules_to_save, {name})"
    if getattr(head, "use_dora", None) and any(head.use_dora.values()):
        return f"under an adapter on the head with DoRA ({name})"
    if module.startswith("peft."):
        return f"under an adapter on the head ({name})"
    return name


@torch.no_grad()
def _probe(model: Any, language_model: Any, probe: Tensor) -> None:
    """One forward of two rows that differ from their middle on: logits against hidden @ head.T, and the states
    before the middle against each other. ``probe`` (1, L)."""
    middle = max(1, probe.shape[1] // 2)
    other = torch.cat([probe[:, :middle], probe[:, middle:].roll(1, 1)], dim=1)
    other[:, middle:] = (other[:, middle:] + 1) % language_model.get_input_embeddings().weight.shape[0]
    caught: list[Tensor] = []
    decoder = getattr(language_model, language_model.base_model_prefix)
    hook = decoder.register_forward_hook(lambda module, arguments, output: caught.append(output.last_hidden_state))
    try:
        logits = model(input_ids=torch.cat([probe, other]), use_cache=False).logits.float()
    finally:
        hook.remove()
    kind = type(language_model).__name__
    if len(caught) != 1:
        raise ValueError(f"{kind} does not read its logits from one call of its decoder; {INSTEAD}")
    (states,) = caught
    tolerance = 8e-3 if states.element_size() < 4 else 1e-3
    read = head_input(language_model, states)
    product = read.hidden.float() @ read.head_weight.float().T
    if logits.shape != product.shape or _differ(logits, product, tolerance):
        raise ValueError(f"the logits of {kind} are not hidden @ head.T; {INSTEAD}")
    if _differ(states[0, :middle].float(), states[1, :middle].float(), tolerance):
        raise ValueError(f"{kind} lets a token see the tokens after it: samples cannot share a forward; {INSTEAD}")


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """By more than the tolerance of the norm; what is not finite on both sides is the training's to refuse."""
    if not bool(one.isfinite().all()) and not bool(other.isfinite().all()):
        return False
    return not bool((one - other).norm() <= tolerance * one.norm())


@contextmanager
def state_as_found(model: Any) -> Iterator[None]:
    """Restores every module's training mode and every parameter's requires_grad (peft's ``disable_adapter``
    turns the latter on for the whole active adapter when it ends)."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No graph and no dropout inside."""
    with state_as_found(model), torch.no_grad():
        model.eval()
        yield
