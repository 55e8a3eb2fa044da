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


@dataclass(frozen=True)
class HeadInput:
    """``hidden`` (1, T, H) and ``head_weight`` (V, H): the logits are ``hidden @ head_weight.T``."""

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


def response_hidden(model: Any, input_ids: Tensor, response_length: int) -> HeadInput:
    """The last hidden states at the response and the head's weight, the head's constant factor folded into
    the hidden states. Only for models that ``require_linear_head`` accepts."""
    language_model = model.get_base_model()
    decoder = getattr(language_model, language_model.base_model_prefix)
    states = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    hidden = states[:, -response_length - 1 : -1]
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


@torch.no_grad()
def require_linear_head(model: Any, input_ids: Tensor) -> None:
    """Raise ValueError unless the model's logits are its last hidden states times one weight matrix.

    Known softcaps and a head bias are refused by name; everything else (an adapter on the head, an unknown
    multiplier) by comparing both on a few tokens. ``input_ids`` (1, L).
    """
    language_model = model.get_base_model()
    kind = type(language_model).__name__
    instead = "distil from logits instead (sdpo_implementations.reference)"
    config = language_model.config.get_text_config()
    if capped := next((name for name in SOFTCAPS if getattr(config, name, None)), None):
        raise ValueError(f"{kind} caps its output logits ({capped}): they are not hidden @ head.T; {instead}")
    head = language_model.get_output_embeddings()
    if head is None or not hasattr(language_model, language_model.base_model_prefix):
        raise ValueError(f"{kind} has no decoder with a linear output head; {instead}")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"the output head of {kind} has a bias: logits are not hidden @ head.T; {instead}")
    probe = input_ids[:, :8]
    read = response_hidden(model, probe, probe.shape[1] - 1) if probe.shape[1] > 1 else None
    if read is None:
        return
    logits = response_logits(model, probe, probe.shape[1] - 1).float()
    product = read.hidden.float() @ read.head_weight.float().T
    half = logits.new_zeros((), dtype=read.hidden.dtype).element_size() < 4
    if (logits - product).norm() > (2e-2 if half else 1e-3) * logits.norm():
        raise ValueError(f"the logits of {kind} are not hidden @ head.T (adapter on the head?); {instead}")


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
