"""Samplers that get the trainer's weights in a wrong way, for tests of the audit: the option ``fault`` of a subject.

nothing: no weights after the first ones. behind: those of one step before. first: only those of the first step.
dropped: without the adapter. twice: with the adapter added twice. head: all but the output layer's. cache: all, but
keys and values of prompts are from the first weights.
"""

from __future__ import annotations

import copy
from typing import Any

import delivery_recorder
import torch
from delivery_recorder import State
from torch import Tensor, nn


class Wrong(nn.Module):
    """A model whose weights are delivered with a fault. ``forward`` is that of transformers."""

    def __init__(self, fault: str, plain: nn.Module) -> None:
        super().__init__()
        self.fault, self.model = fault, copy.deepcopy(plain).eval()
        self.config = self.model.config
        self.filled: nn.Module | None = None  # its keys and values are kept

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def deliver(self, states: list[State]) -> Wrong:
        """Take the weights of the newest state, but for the fault."""
        now, start, before = states[-1], states[0], states[max(0, len(states) - 2)]
        first = states[min(1, len(states) - 1)]
        chosen = {"nothing": start, "behind": before, "first": first}.get(self.fault, now)
        weights = dict(chosen.whole)
        times = {"dropped": -1, "twice": 1}.get(self.fault, 0)
        weights |= {name: weights[name] + times * part for name, part in now.added.items()}
        if self.fault == "head":
            weights["lm_head.weight"] = start.whole["lm_head.weight"]
        delivery_recorder.set_weights(self.model, weights)
        if self.fault == "cache" and self.filled is None:
            self.filled = copy.deepcopy(self.model)
        return self

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        if self.filled is not None and past_key_values is None:
            return delivery_recorder.cached(self.model, self.filled, input_ids, input_ids.shape[1])
        return self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, count: int, temperature: float, stop: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return prompts and completions [R, T], and the scores [R, V] of every place; tokens after a stop are 0."""
        ids, out, scores, past = prompts, [prompts], [], None
        done = torch.zeros(len(prompts), dtype=torch.bool)
        for _ in range(count):
            made = self(ids, past)
            past = made.past_key_values
            scores.append(made.logits[:, -1] / temperature)
            ids = torch.multinomial(scores[-1].softmax(-1), 1)
            ids = ids.masked_fill(done[:, None], 0)
            done = done | (ids[:, 0] == stop)
            out.append(ids)
        return torch.cat(out, 1), scores
