"""Watches a model during RL training, in the audited environment. It needs only torch.

For every optimizer step, it computes the exact float64 gradient of the log-probability of every token of every
sample, at the step's own parameters, and writes their inner products with each other and with the gradient that
plain SGD used. From these, the audit solves for one coefficient per token.

Shapes: P parameters, K columns (the tokens of all completions, row by row; then the tokens of each group's
prompt, once; then one column per row with the sum of its tokens' entropies).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from recorder import Recorder, flat, logits_of, parameters_of
from torch import Tensor, nn

UNEXPLAINED = 3e-4  # relative; beyond this, other temperatures and shifts are tried
EPS = 2.0**-24  # of the float32 parameters that are read back


def log_softmax(model: nn.Module, ids: Sequence[int], temperature: float) -> Tensor:
    """Return log p [T, V] for every position of one unpadded sequence, at least in float32."""
    logits = logits_of(model(input_ids=torch.tensor([list(ids)])))[0]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, -1)


def completion_logps(model: nn.Module, row: dict[str, Any], temperature: float) -> Tensor:
    """Return log p [T] of the tokens of a row's completion."""
    ids, start = row["ids"], row["trained"].index(1)
    logp = log_softmax(model, ids, temperature)
    return logp[start - 1 : -1].gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]


class RLRecorder(Recorder):
    """The recorder of one rank. ``reference`` is the frozen model of a KL term; ``asked`` has the objective as
    the framework's own configuration describes it."""

    def __init__(self, spec: Any, model: nn.Module, reference: nn.Module | None = None) -> None:
        super().__init__(spec, model)
        self.temperature = float(spec.case["temperature"])
        self.reference = None if reference is None else copy.deepcopy(reference).double().eval()
        self.engine: list[list[float]] = []  # per rollout batch: log-probabilities of the sampler
        self.asked: dict[str, Any] | None = None
        self.expected: list[list[float]] = []  # per step: the K coefficients, if the subject knows them
        self.labels: list[str] = []  # per step: a name, if the subject's steps differ

    def begin_again(self) -> None:
        """End the step that was taken last. The parameters may then be set to other values."""
        self._close_step()
        self.before = None

    def finish(self, **versions: str) -> None:
        super().finish(**versions)
        path = self.spec.folder / f"rank-{self.spec.rank}.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        found |= {
            "asked": self.asked,
            "engine": self.engine,
            "expected": self.expected,
            "labels": self.labels,
        }
        if self.reference is not None and self.spec.rank == 0:
            found["reference"] = self._all_logps(self.reference)
        path.write_text(json.dumps(found), encoding="utf-8")

    def _all_logps(self, model: nn.Module) -> list[float]:
        with torch.no_grad():
            return [
                float(x) for row in self.spec.rows for x in completion_logps(model, row, self.temperature)
            ]

    def rollout(self) -> list[list[float]]:
        """Return the sampler's log-probabilities of every row: the policy's, plus the case's known differences."""
        model = copy.deepcopy(self.copy)
        own = parameters_of(model)
        for parameter, part in zip(own, self.snapshot().split([p.numel() for p in own]), strict=True):
            parameter.data.copy_(part.view_as(parameter))
        draw = torch.Generator().manual_seed(1)
        lines = []
        with torch.no_grad():
            for row in self.spec.rows:
                exact = completion_logps(model, row, self.temperature)
                gaps = torch.randn(exact.shape, generator=draw, dtype=torch.float64)
                lines.append((exact + float(self.spec.case["engine_gap"]) * gaps).tolist())
        self.engine.append([x for line in lines for x in line])
        return lines

    def _write_step(self, index: int, before: Tensor, after: Tensor, lines: Any) -> dict[str, Any]:
        micro = [[row for line in batch for row in line] for batch in lines]
        step: dict[str, Any] = {
            "microbatches": micro,
            "after": self._write(f"after-{self.spec.rank}-{index}", after),
        }
        if self.spec.rank:
            return step
        own = parameters_of(self.copy)
        for parameter, part in zip(own, before.split([p.numel() for p in own]), strict=True):
            parameter.data.copy_(part.view_as(parameter))
        used = (before - after) / self.spec.lr
        step |= {"square": float(used @ used), "finite": bool(torch.isfinite(after).all())}
        if not step["finite"]:
            return {**step, "square": 0.0}
        fits: list[dict[str, Any]] = []
        t = self.temperature
        for temperature, shift in ((t, 1), (1.0, 1), (1 / t, 1), (t, 0), (t, 2)):
            fit, missed = self._fit(f"{index}-{len(fits)}", temperature, shift, used)
            fits.append(fit)
            if missed <= UNEXPLAINED:
                break
        read_back = EPS * float(before.norm() + after.norm()) / self.spec.lr
        return {**step, "fits": fits, "read_back": read_back}

    def _fit(self, name: str, temperature: float, shift: int, used: Tensor) -> tuple[dict[str, Any], float]:
        """Return the inner products of one temperature and shift, and the share that they do not explain."""
        columns, logps = self._columns(self.copy, temperature, shift)
        gram, projection = columns @ columns.T, columns @ used
        solution = torch.linalg.lstsq(gram, projection[:, None], driver="gelsd").solution[:, 0]
        rest = used - columns.T @ solution
        fit = {"temperature": temperature, "shift": shift, "logps": logps.tolist()}
        fit |= {
            "gram": self._write(f"gram-{name}", gram),
            "projection": self._write(f"projection-{name}", projection),
        }
        # The same coefficients in the subject's own precision show the rounding of a correct step.
        rough = self._weighted(copy.deepcopy(self.copy).to(self.spec.dtype), temperature, shift, solution)
        fit["rounding"] = float((rough - columns.T @ solution).norm())
        fit["residual"] = float(rest.norm())
        return fit, float(rest.norm() / used.norm()) if float(used.norm()) else 0.0

    def _outputs(
        self, model: nn.Module, number: int, temperature: float, shift: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p of the completion's and the prompt's tokens, and the sum of the completion's entropies."""
        row = self.spec.rows[number]
        ids, start = row["ids"], row["trained"].index(1)
        logp = log_softmax(model, ids, temperature)
        at = torch.arange(1, len(ids))
        chosen = logp[(at - shift).clamp(min=0), torch.tensor(ids[1:])]
        each = -(logp.exp() * logp).sum(-1)[start - 1 : -1]
        meant = row.get("entropy_of", [1] * len(each))  # the tokens of the entropy's column
        entropy = (each * torch.tensor(meant)).sum()
        return chosen[start - 1 :], chosen[: start - 1], entropy[None]

    def _columns(self, model: nn.Module, temperature: float, shift: int) -> tuple[Tensor, Tensor]:
        """Return the gradients [K, P] of all columns, and log p of all completions' tokens."""
        tokens, prompts, entropies, logps, seen = [], [], [], [], set()
        own = parameters_of(model)
        for number, row in enumerate(self.spec.rows):
            parts = self._outputs(model, number, temperature, shift)
            sizes, outputs = [len(part) for part in parts], torch.cat(parts)
            lines = []
            for output in outputs:
                found = torch.autograd.grad(output, own, retain_graph=True, allow_unused=True)
                pairs = zip(found, own, strict=True)
                lines.append(flat([torch.zeros_like(p) if g is None else g for g, p in pairs]))
            first, second, third = torch.stack(lines).split(sizes)
            tokens.append(first)
            entropies.append(third)
            logps.append(parts[0].detach())
            if row["group"] not in seen:
                seen.add(row["group"])
                prompts.append(second)
        return torch.cat([*tokens, *prompts, *entropies]), torch.cat(logps)

    def _weighted(self, model: nn.Module, temperature: float, shift: int, weights: Tensor) -> Tensor:
        """Return Σ_k weights_k · ∇(column k), row by row, in the precision of ``model``."""
        rows, own, seen = self.spec.rows, parameters_of(model), set()
        counts = [sum(row["trained"]) for row in rows]
        at, prompt_at, entropy_at = 0, sum(counts), len(weights) - len(rows)
        model.zero_grad()
        for number, row in enumerate(rows):
            lps, prompt, entropy = self._outputs(model, number, temperature, shift)
            loss = (lps * weights[at : at + len(lps)].to(lps.dtype)).sum() + entropy[0] * float(
                weights[entropy_at + number]
            )
            at += len(lps)
            if row["group"] not in seen:
                seen.add(row["group"])
                own_part = weights[prompt_at : prompt_at + len(prompt)].to(prompt.dtype)
                loss, prompt_at = loss + (prompt * own_part).sum(), prompt_at + len(prompt)
            loss.backward()
        return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in own])
