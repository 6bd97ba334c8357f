"""Records what a sampler samples between known updates, and what it would have had to report with which weights.

``weights`` is called with the trainer's weights before the first step and after every step, ``sampled`` with the samples
that follow. Adapters are merged here, in float64, into the weights of a model without adapters and without ties.
Shapes: N tokens of a round, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import rl_harness
import torch
from recorder import logits_of
from torch import Tensor, nn

ADAPTER = re.compile(r"(.*)\.lora_A(\.default\.weight)?")
Weights = Mapping[str, Tensor]
Sample = tuple[list[int], list[int], "list[float] | None"]  # prompt, completion, reported log-probabilities


@dataclass
class State:
    """The weights at one moment in float64. ``added`` is what adapters add to them; ``whole`` includes it."""

    whole: dict[str, Tensor]
    added: dict[str, Tensor]


@dataclass
class Found:
    """What is known of a candidate, as ``measure.delivery.Candidate``."""

    kind: str
    names: list[str]
    logps: list[float]
    moments: list[list[float]]


def tiny_models(spec: harness.Spec) -> tuple[nn.Module, nn.Module]:
    """Return a tiny model, with tied tables if the option ``tied`` is set, and a copy of it that is not tied."""
    model = rl_harness.sharp_model(spec)
    plain = copy.deepcopy(model)
    if spec.options.get("tied"):
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
        with torch.no_grad():
            plain.lm_head.weight.copy_(plain.get_input_embeddings().weight)
    return model, plain


def state_of(named: Weights, scale: float = 0.0) -> State:
    """Return the state of a model's tensors by name, with truestep's or PEFT's names of adapters."""
    plain = {
        re.sub(r"^base_model\.model\.|\.base_layer(?=\.)", "", name): tensor.detach().double().clone()
        for name, tensor in named.items()
        if ".lora_" not in name
    }
    added = {}
    for name, first in named.items():
        if match := ADAPTER.fullmatch(name):
            second = named[name.replace(".lora_A", ".lora_B")]
            layer = match[1].removeprefix("base_model.model.")
            added[f"{layer}.weight"] = scale * second.detach().double() @ first.detach().double()
    return State({name: t + added[name] if name in added else t for name, t in plain.items()}, added)


def set_weights(model: nn.Module, weights: Weights) -> nn.Module:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return model


def cached(model: Callable[..., Any], filled: Callable[..., Any], ids: Tensor, prompt: int) -> Any:
    """Return the outputs [R, T] of all tokens after the prompt's last but one, with the keys and values of the tokens
    before from another model, as with a prefix cache that was not reset."""
    past = filled(input_ids=ids[:, : prompt - 1], use_cache=True).past_key_values
    return model(input_ids=ids[:, prompt - 1 :], past_key_values=past, use_cache=True)


class Delivery:
    """The recorder of one run. ``plain`` is a model without adapters and ties, of the trained model's class."""

    def __init__(self, spec: harness.Spec, plain: nn.Module) -> None:
        self.spec, self.plain = spec, plain
        self.model = copy.deepcopy(plain).double().eval()
        self.other = copy.deepcopy(self.model)
        self.versions: dict[str, str] = {}  # of the sampler
        self.states: list[State] = []
        self.rounds: list[list[Sample]] = []
        self.began = time.monotonic()

    def weights(self, state: State) -> None:
        self.states.append(state)

    def sampled(self, samples: Sequence[Sample]) -> None:
        """Take the samples of one round. Tokens after a stop token are left out."""
        if len(self.rounds) >= len(self.states):
            raise RuntimeError(f"round {len(self.rounds) + 1} was sampled before step {len(self.rounds)}")
        stop, kept = self.spec.case["stop"], []
        for prompt, completion, reported in samples:
            end = completion.index(stop) + 1 if stop in completion else len(completion)
            kept.append((prompt, completion[:end], reported and reported[:end]))
        self.rounds.append(kept)

    def _table(self, ids: Tensor, prompt: int, weights: Weights, filled: Weights | None = None) -> Tensor:
        """Return log π [R, T, V] for the tokens after the prompt."""
        set_weights(self.model, weights)
        if filled is None:
            logits = logits_of(self.model(input_ids=ids))[:, prompt - 1 : -1]
        else:
            logits = logits_of(cached(self.model, set_weights(self.other, filled), ids, prompt))[:, :-1]
        return torch.log_softmax(logits.double() / self.spec.case["temperature"], -1)

    def _parts(self) -> list[tuple[str, ...]]:
        """Return the sets of tensors that may have been left out: each alone, those of a layer, and all vectors."""
        first, last = self.states[0].whole, self.states[-1].whole
        names = [name for name in self.model.state_dict() if not torch.equal(first[name], last[name])]
        layers: dict[str, list[str]] = {}
        for name in names:
            if found := re.match(r".*?\.\d+\.", name):
                layers.setdefault(found[0], []).append(name)
        vectors = [name for name in names if first[name].dim() == 1]
        groups = [*([name] for name in names), *layers.values(), vectors]
        return [group for group in dict.fromkeys(map(tuple, groups)) if group and len(group) < len(names)]

    def _candidates(self, number: int, parts: Sequence[tuple[str, ...]]) -> Iterator[tuple[Any, ...]]:
        """Yield (kind, names, weights, weights that filled the cache) for a round, in the same order for all."""
        now, start, before = self.states[number], self.states[0], self.states[max(0, number - 1)]
        yield "new", (), now.whole, None
        yield "start", (), start.whole, None
        yield "behind", (), before.whole, None
        yield "first", (), self.states[min(1, number)].whole, None
        yield "cache", (), now.whole, start.whole
        if now.added:
            for kind, times in (("dropped", -1), ("twice", 1)):
                changed = {name: now.whole[name] + times * part for name, part in now.added.items()}
                yield kind, (), {**now.whole, **changed}, None
        for names in parts:
            yield "part", names, {**now.whole, **{name: start.whole[name] for name in names}}, None

    @torch.no_grad()
    def finish(self, **versions: str) -> None:
        """Write log π of every candidate, and that of the new weights in the subject's own precision."""
        ran, found, parts = time.monotonic(), list[Found](), self._parts()
        rounded: list[float] = []
        for number, samples in enumerate(self.rounds):
            ids = harness.padded([[*prompt, *completion] for prompt, completion, _ in samples], 0)
            prompt, longest = len(samples[0][0]), max(len(completion) for _, completion, _ in samples)
            is_token = torch.tensor([[i < len(c) for i in range(longest)] for _, c, _ in samples])
            tokens = ids[:, prompt:][is_token]
            made = list(self._candidates(number, parts))
            tables = torch.stack([self._table(ids, prompt, *weights)[is_token] for _, _, *weights in made])
            found = found or [
                Found(kind, list(names), [], [[0.0, 0.0] for _ in made]) for kind, names, *_ in made
            ]
            for one, table in zip(found, tables, strict=True):
                one.logps += table[torch.arange(len(tokens)), tokens].tolist()
                for total, part in zip(one.moments, moments(table, tables), strict=True):
                    total[:] = [x + y for x, y in zip(total, part, strict=True)]
            narrow = set_weights(copy.deepcopy(self.model).to(self.spec.dtype), self.states[number].whole)
            logits = logits_of(narrow(input_ids=ids))[:, prompt - 1 : -1].float()
            table = torch.log_softmax(logits / self.spec.case["temperature"], -1)[is_token]
            rounded += table[torch.arange(len(tokens)), tokens].tolist()
        lines = [reported for samples in self.rounds for _, _, reported in samples]
        given = [line for line in lines if line is not None]
        blind = len(given) < len(lines)
        took = {"run": ran - self.began, "reference": time.monotonic() - ran}
        document = {
            "candidates": [vars(one) for one in found],
            "reported": None if blind else [x for line in given for x in line],
            "rounded": None if blind else rounded,
            "versions": {**versions, "torch": torch.__version__},
            "seconds": took,
        }
        (self.spec.folder / "delivery.json").write_text(json.dumps(document), encoding="utf-8")


def moments(table: Tensor, others: Tensor) -> list[list[float]]:
    """Return the mean and the variance of Σ (log π − log π_other) if the tokens are from π, for all others.
    Shapes: N V, and K N V."""
    difference, chance = table - others, table.exp()
    mean = (chance * difference).sum(-1)  # K, N
    variance = (chance * difference**2).sum(-1) - mean**2
    return torch.stack([mean.sum(-1), variance.clamp(min=0).sum(-1)], 1).tolist()
