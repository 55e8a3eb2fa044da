"""What is known of a failure in front of an output head: log-probs of a response, or a teacher's top-k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdpo_conformance.inputs.heads import HeadCase
from sdpo_conformance.judging.call import implementation_errors
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import Expectations
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.diagnosis.observed import Observed, got_in, offered, words_of
from sdpo_conformance.specs.claas.head_bounds import at, response_logprobs, support_size, vocabulary_logprobs


@dataclass(frozen=True, eq=False)
class ObservedHead(Observed):
    """``values``: ``log-prob`` (B, T); of a top-k ``log-prob`` (B, T, K) and ``token``, the true log-probs of the
    tokens that came back, the likeliest first: ties may stand in any order, and any of them may be left out."""

    case: HeadCase

    @classmethod
    def load(cls, path: Path, requirement: str, entry: Capability, failure: Mapping[str, object]) -> ObservedHead:
        """Read what a run left of a failure."""
        case = HeadCase.load(path)
        return cls(requirement, entry, case, comparable(case, got_in(path)), **words_of(failure))

    @cached_property
    def truth(self) -> Expectations:
        if self.entry is Capability.RESPONSE_LOGPROBS:
            return Expectations({"log-prob": response_logprobs(self.case)}, {}, True)
        whole = vocabulary_logprobs(self.case)
        likeliest = at(whole, whole.value.topk(support_size(self.case), dim=-1).indices)
        return Expectations({"log-prob": likeliest, "token": likeliest}, {}, True)

    def predicted(self, defect: Defect, native: bool, gradient: bool) -> Mapping[str, Tensor]:
        del gradient  # there is none
        function, case = offered(defect, self.entry), self.case
        hidden, head = (one.clone() if native else one.double() for one in (case.hidden, case.head))
        with implementation_errors(defect.name):
            if self.entry is Capability.RESPONSE_LOGPROBS:
                return {"log-prob": function(hidden, head, case.response_ids).detach().double()}
            logprobs, ids = function(hidden, head, case.k)
            return comparable(case, {"log-prob": logprobs.detach().double(), "token": ids})

    @property
    def numeric(self) -> bool:
        return bool(self.values)

    @property
    def size(self) -> int:
        return self.case.hidden[..., 0].numel() * self.case.vocabulary


def comparable(case: HeadCase, returned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What came back in the form of ``values``; an id outside the vocabulary counts as a token of log-prob 1."""
    if "token" not in returned:
        return dict(returned)
    ids, whole = returned["token"].long(), vocabulary_logprobs(case).value
    inside = (ids >= 0) & (ids < case.vocabulary)
    tokens = torch.where(inside, whole.gather(-1, ids.clamp(0, case.vocabulary - 1)), 1.0)
    order = tokens.argsort(dim=-1, descending=True, stable=True)
    return {"log-prob": returned["log-prob"].gather(-1, order), "token": tokens.gather(-1, order)}
