"""A reference RL step in plain torch with replaceable parts. It is correct unless a part is replaced.

One process simulates all ranks. The loss is written as frameworks write it, with padded tensors, masks and
autograd, and not with coefficients. Only the mutants and tests import this module.

Shapes: B rows of a micro-batch, T padded tokens without the first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truestep.audit.environments.in_process import subject_module
from truestep.audit.measure.rl import cases
from truestep.audit.measure.rl.observed import RLObservation, load

LEARNING_RATE = 0.2
SPREAD = 0.05  # of the differences between the policy and the frozen reference
harness, rl_recorder = subject_module("harness"), subject_module("rl_recorder")


@dataclass
class Rows:
    """Some rows as padded tensors [B, T], with what the loss needs for each."""

    numbers: list[int]
    ids: Tensor  # B, T + 1
    mask: Tensor  # B, T: completion tokens that exist
    trained: Tensor  # B, T
    advantage: Tensor  # B, 1
    old: Tensor = field(default_factory=lambda: torch.zeros(0))  # B, T
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    engine: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class Window:
    """All micro-batches of one update, by rank, and the whole rollout batch."""

    micro: list[list[Rows]]
    rollout: list[Rows]
    number: int  # of the update in its rollout batch

    @property
    def every(self) -> list[Rows]:
        return [rows for rank in self.micro for rows in rank]


class GRPO:
    """Subclasses replace single methods. Class attributes are the settings."""

    temperature, clip_low, clip_high, dual = cases.TEMPERATURE, 0.2, 0.2, 0.0
    std, epsilon, normaliser = True, 1e-4, "tokens"
    beta, kl, entropy = 0.0, "k3", 0.0
    mask_truncated, correct_high = False, 0.0
    level = "token"

    def __init__(self, case: cases.RLCase, folder: Path, num_ranks: int) -> None:
        self.case, self.num_ranks = case, num_ranks
        self.rate = LEARNING_RATE * case.rate
        raw = {"options": {"arch": "plain"}, "learning_rate": self.rate}
        self.model = harness.tiny_model(harness.Spec(folder, case.to_json(), raw))
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(2.0)  # sharper distributions, so that ratios leave the clip range
        self.reference = copy.deepcopy(self.model)
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(SPREAD * torch.randn(p.shape, generator=draw))
        self.replicas, self.recorders = [], []
        for rank in range(num_ranks):
            spec = harness.Spec(folder, case.to_json(), raw)
            spec.rank, spec.world_size = rank, num_ranks
            replica = copy.deepcopy(self.model).train()
            self.replicas.append(replica)
            self.recorders.append(rl_recorder.RLRecorder(spec, replica, self.reference))

    # ------------------------------------------------------------------------------------------------ the data

    def rewards(self) -> Tensor:
        return torch.tensor([row.reward for row in self.case.rows])

    def advantages(self) -> Tensor:
        """Return the advantage of every row."""
        groups = self.rewards().view(-1, cases.GROUP)
        centered = groups - groups.mean(1, keepdim=True)
        return (centered / (groups.std(1, keepdim=True) + self.epsilon) if self.std else centered).flatten()

    def trains(self, row: int) -> bool:
        return not (self.mask_truncated and self.case.rows[row].truncated)

    def collate(self, numbers: Sequence[int]) -> Rows:
        rows, advantages = [self.case.rows[i] for i in numbers], self.advantages()
        ids = harness.padded([row.ids for row in rows], 0)
        mask = harness.padded([row.trained for row in rows], 0)[:, 1:].float()
        trained = mask * torch.tensor([[float(self.trains(i))] for i in numbers])
        made = Rows(list(numbers), ids, mask, trained, advantages[list(numbers)][:, None])
        made.trained = self.token_mask(made)
        return made

    def token_mask(self, rows: Rows) -> Tensor:
        return rows.trained

    def logits(self, model: Any, rows: Rows) -> Tensor:
        return model(input_ids=rows.ids)[:, :-1] / self.temperature

    def logps(self, model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return log p of every next token and the entropies [B, T]."""
        logp = torch.log_softmax(self.logits(model, rows), -1)
        return logp.gather(-1, rows.ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)

    def score(self, rows: Rows, engine: list[list[float]], rollout: int) -> None:
        """Add the log-probabilities that are taken before the updates."""
        with torch.no_grad():
            rows.old = self.old_logps(rows, rollout)
            rows.reference = self.logps(self.anchor(), rows)[0]
            rows.engine = torch.zeros_like(rows.old)
            rows.engine[rows.mask.bool()] = torch.tensor([x for i in rows.numbers for x in engine[i]])

    def old_logps(self, rows: Rows, rollout: int) -> Tensor:
        return self.logps(self.replicas[0], rows)[0]

    def anchor(self) -> Any:
        return self.reference

    # ------------------------------------------------------------------------------------------------ the loss

    def log_ratio(self, logp: Tensor, rows: Rows) -> Tensor:
        gap = logp - rows.old
        if self.level == "sequence":
            gap = ((gap * rows.trained).sum(1) / rows.trained.sum(1).clamp(min=1))[:, None].expand_as(gap)
        return gap

    def surrogate(self, ratio: Tensor, logp: Tensor, rows: Rows) -> Tensor:
        """Return the loss of every token."""
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = -torch.minimum(ratio * rows.advantage, clipped * rows.advantage)
        if self.dual:
            loss = torch.where(rows.advantage < 0, torch.minimum(loss, -self.dual * rows.advantage), loss)
        return loss

    def correction(self, rows: Rows) -> Tensor | float:
        return (rows.old - rows.engine).exp().clamp(max=self.correct_high) if self.correct_high else 1.0

    def kl_loss(self, logp: Tensor, rows: Rows, ratio: Tensor) -> Tensor:
        d = logp - rows.reference
        return {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) + d - 1}[self.kl]

    def counted(self, rows: Rows) -> Tensor:
        """Return how many tokens of each row the normaliser counts [B]."""
        return rows.trained.sum(1)

    def size(self, rows: Rows) -> float:
        """Return how many rows the normaliser counts."""
        return float(len(rows.numbers))

    def share(self, rows: Rows, window: Window, rank: int) -> Tensor:
        """Return the weight of a row's tokens in the step's loss, [B, 1]. The losses of all micro-batches and
        ranks are summed."""
        return 1 / self.total(rows, window.every)

    def total(self, rows: Rows, counted: Sequence[Rows]) -> Tensor:
        """Return the normaliser of every row [B, 1], counted over ``counted``."""
        number = sum(self.size(part) for part in counted)
        tokens = sum(float(self.counted(part).sum()) for part in counted)
        own = self.counted(rows)[:, None].clamp(min=1)
        ones = torch.ones_like(own)
        return {"tokens": ones * tokens, "sequences": own * number, "sequence_sums": ones * number,
                "max_length": ones * number * self.case.max_tokens}[self.normaliser]  # fmt: skip

    def kl_share(self, rows: Rows, window: Window, rank: int) -> Tensor:
        return self.share(rows, window, rank)

    def entropy_share(self, rows: Rows, window: Window, rank: int) -> Tensor:
        return torch.ones(len(rows.numbers), 1) / sum(float(part.trained.sum()) for part in window.every)

    def loss(self, rows: Rows, window: Window, rank: int) -> Tensor:
        logp, entropy = self.logps(self.replicas[rank], rows)
        ratio = self.log_ratio(logp, rows).exp()
        each = self.surrogate(ratio, logp, rows) * self.correction(rows)
        loss = (each * rows.trained * self.share(rows, window, rank)).sum()
        if self.beta:
            kl = self.beta * self.kl_loss(logp, rows, ratio)
            loss = loss + (kl * rows.trained * self.kl_share(rows, window, rank)).sum()
        if self.entropy:
            bonus = self.entropy * entropy * rows.trained
            loss = loss - (bonus * self.entropy_share(rows, window, rank)).sum()
        return loss

    # ------------------------------------------------------------------------------------------------ the steps

    def parts(self) -> list[list[int]]:
        """Return the rows of each update of one pass."""
        size = len(self.case.rows) // self.case.parts
        return [list(range(i, i + size)) for i in range(0, len(self.case.rows), size)]

    def split(self, numbers: Sequence[int]) -> list[list[list[int]]]:
        """Return the rows of every rank's micro-batches."""
        size = self.case.rows_per_microbatch
        micro = [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]
        mine = len(micro) // self.num_ranks
        return [micro[rank * mine : (rank + 1) * mine] for rank in range(self.num_ranks)]

    def combine(self, gradients: list[list[list[Tensor]]]) -> list[Tensor]:
        """Return the gradient of the step from those of all ranks' micro-batches."""
        every = [micro for rank in gradients for micro in rank]
        return [torch.stack(parts).sum(0) for parts in zip(*every, strict=True)]

    def gradients(self, window: Window) -> list[list[list[Tensor]]]:
        found: list[list[list[Tensor]]] = []
        for rank, replica in enumerate(self.replicas):
            found.append([])
            for rows in window.micro[rank]:
                replica.zero_grad()
                loss = self.loss(rows, window, rank)
                loss.backward()
                zeros = [
                    torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in replica.parameters()
                ]
                found[rank].append(zeros)
        return found

    def train(self) -> None:
        for rollout in range(self.case.rollouts):
            engine = self.recorders[0].rollout()
            updates = [
                [[self.collate(rows) for rows in rank] for rank in self.split(part)] for part in self.parts()
            ]
            every = [rows for update in updates for rank in update for rows in rank]
            for rows in every:
                self.score(rows, engine, rollout)
            for number in range(self.case.updates):
                window = Window(updates[number % self.case.parts], every, number)
                step = self.combine(self.gradients(window))
                with torch.no_grad():
                    for replica in self.replicas:
                        for parameter, gradient in zip(replica.parameters(), step, strict=True):
                            parameter -= self.rate * gradient


def observe(
    trainer: type[GRPO],
    folder: Path,
    asked: dict[str, Any],
    names: Sequence[str],
    num_ranks: int = 1,
    seed: int = 0,
) -> dict[str, RLObservation]:
    """Train on every case and return what the recorders saw, read back as in every audit."""
    runs = {}
    for name in names:
        case = cases.build(name, world_size=num_ranks, seed=seed)
        place = folder / name
        place.mkdir()
        made = trainer(case, place, num_ranks)
        made.train()
        for recorder in reversed(made.recorders):
            recorder.asked = asked
            recorder.finish()
        runs[name] = load(place, case)
    return runs
