"""The graded groups of a step before they are trained on, and their form in a checkpoint.

With ``rollout_ahead`` = 1, the groups of step s + 1 wait while step s trains, so a checkpoint between two steps
contains them. What a checkpoint contains is the same on every rank: the groups of all ranks, as JSON and one group
of tensors. If another number of ranks continues, each mini-batch is divided by the place of its groups, as it is
when the groups are sampled. Held by: tests/contract/test_rollout_ahead.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from truestep.flops import Ledger
from truestep.records import Distribution, Group, Origin, Prompt, Rollout, Round, Score, Stop, Verdict
from truestep.train.parallel import Ranks
from truestep.train.sequences import GatedGroup

NOT_TRAINED = -1  # the mini-batch of a group that was replaced by others
# The columns of all tokens, in order. A hinted prompt has only ids.
COLUMNS = {
    "tokens": torch.int64, "origin": torch.int8, "policy_version": torch.int32, "behavior_logprobs": torch.float64,
    "prompt_ids": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The graded and gated groups of a step on this rank. ``cuts`` are those of each mini-batch, and
    ``everything`` has also the groups that were replaced by others. ``compared`` are metrics of the gap between
    engine and trainer under the weights that sampled."""

    step: int
    cuts: list[list[GatedGroup]]
    everything: list[GatedGroup]
    controls: Mapping[str, float] = field(default_factory=dict)
    work: Ledger = field(default_factory=Ledger)
    compared: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The waiting groups of all ranks. ``groups`` are plain records, in the order of ranks."""

    step: int
    num_cuts: int
    world_size: int
    groups: list[dict[str, Any]]
    work: Ledger
    compared: Mapping[str, float]

    def state(self) -> dict[str, Any]:
        """Return the part that is stored as JSON: everything except what ``tensors`` returns."""
        groups = [
            {**group, "rollouts": [_without_columns(r) for r in group["rollouts"]]} for group in self.groups
        ]
        own = {"step": self.step, "num_cuts": self.num_cuts, "world_size": self.world_size}
        return {**own, "groups": groups, "work": asdict(self.work), "compared": dict(self.compared)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the columns of all rollouts, concatenated in the order of ``state``."""
        rollouts = [r for group in self.groups for r in group["rollouts"]]
        return {
            name: torch.tensor([x for r in rollouts for x in r[name] or ()], dtype=dtype)
            for name, dtype in COLUMNS.items()
        }

    @staticmethod
    def load(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Whole:
        columns = {name: iter(tensors[name].tolist()) for name in COLUMNS}

        def rollout(header: Mapping[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = {
                name: list(islice(columns[name], header["lengths"][name])) for name in COLUMNS
            }
            if not header["has_logprobs"]:
                found |= {"behavior_logprobs": None}
            return {k: v for k, v in header.items() if k not in ("lengths", "has_logprobs")} | found

        groups = [{**g, "rollouts": [rollout(r) for r in g["rollouts"]]} for g in state["groups"]]
        work, own = Ledger(**state["work"]), {k: state[k] for k in ("step", "num_cuts", "world_size")}
        return Whole(**own, groups=groups, work=work, compared=state["compared"])

    def share(self, ranks: Ranks, prompts: Mapping[str, Prompt], gate: Callable[..., GatedGroup]) -> Sampled:
        """Return this rank's groups. ``gate`` makes a gated group from a group."""
        if ranks.world_size == self.world_size:
            mine = [g for g in self.groups if g["rank"] == ranks.rank]
        else:
            parts = [
                sorted((g for g in self.groups if g["cut"] == cut), key=lambda g: g["place"])
                for cut in (*range(self.num_cuts), NOT_TRAINED)
            ]
            mine = [group for part in parts for group in ranks.mine(part)]
        cuts: list[list[GatedGroup]] = [[] for _ in range(self.num_cuts)]
        numbered: list[tuple[tuple[int, int], GatedGroup]] = []
        for record in mine:
            made = gate(_group(record, prompts), (record["place"][0], record["place"][1]))
            numbered.append((made.place, made))
            if record["cut"] != NOT_TRAINED:
                cuts[record["cut"]].append(made)
        everything = [made for _, made in sorted(numbered, key=lambda pair: pair[0])]
        # The sum over ranks is what was saved.
        work = self.work if ranks.rank == 0 else Ledger()
        return Sampled(step=self.step, cuts=cuts, everything=everything, work=work, compared=self.compared)


def gathered(sampled: Sampled, ranks: Ranks) -> Whole:
    """Join the waiting groups of all ranks (a collective)."""
    cut_of = {id(g): number for number, cut in enumerate(sampled.cuts) for g in cut}
    trained = [g for cut in sampled.cuts for g in cut]
    ordered = [*trained, *[g for g in sampled.everything if id(g) not in cut_of]]
    mine = [_record(g, cut_of.get(id(g), NOT_TRAINED), ranks.rank) for g in ordered]
    found = ranks.gather({"groups": mine, "work": asdict(sampled.work)})
    work = sum((Ledger(**part["work"]) for part in found), Ledger())
    groups = [group for part in found for group in part["groups"]]
    own = {"step": sampled.step, "num_cuts": len(sampled.cuts), "world_size": ranks.world_size}
    return Whole(**own, groups=groups, work=work, compared=sampled.compared)


def _record(gated: GatedGroup, cut: int, rank: int) -> dict[str, Any]:
    group = gated.group
    return {
        "rank": rank, "cut": cut, "place": list(gated.place), "problem": group.prompt.problem.id,
        "discarded": group.num_discarded_tokens, "scores": [asdict(score) for score in group.scores],
        "rollouts": [_rollout_record(r) for r in group.rollouts],
    }  # fmt: skip


def _rollout_record(r: Rollout) -> dict[str, Any]:
    return {
        "sample_index": r.sample_index, "stop": r.stop.value, "error": r.error,
        "distribution": asdict(r.distribution), "round": asdict(r.round),
        "tokens": list(r.completion_ids), "origin": [int(o) for o in r.origin],
        "policy_version": list(r.policy_version), "prompt_ids": list(r.prompt_ids),
        "behavior_logprobs": None if r.behavior_logprobs is None else list(r.behavior_logprobs),
    }  # fmt: skip


def _without_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header of a rollout: its record with the lengths of the columns instead of the columns."""
    header = {key: value for key, value in record.items() if key not in COLUMNS}
    lengths = {name: len(record[name] or ()) for name in COLUMNS}
    return {**header, "lengths": lengths, "has_logprobs": record["behavior_logprobs"] is not None}


def _group(record: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> Group:
    prompt = prompts[record["problem"]]
    return Group(
        prompt=prompt, num_discarded_tokens=record["discarded"],
        rollouts=tuple(_rollout(r, record["problem"]) for r in record["rollouts"]),
        scores=tuple(_score(s) for s in record["scores"]),
    )  # fmt: skip


def _rollout(record: Mapping[str, Any], problem_id: str) -> Rollout:
    around, logprobs = record["round"], record["behavior_logprobs"]
    return Rollout(
        problem_id=problem_id, sample_index=record["sample_index"], completion_ids=tuple(record["tokens"]),
        origin=tuple(Origin(o) for o in record["origin"]), policy_version=tuple(record["policy_version"]),
        behavior_logprobs=None if logprobs is None else tuple(logprobs),
        distribution=Distribution(**record["distribution"]), stop=Stop(record["stop"]), error=record["error"],
        prompt_ids=tuple(record["prompt_ids"]),
        round=Round(**{**around, "prefix_origin": Origin(around["prefix_origin"])}),
    )  # fmt: skip


def _score(record: Mapping[str, Any]) -> Score:
    verdict = record["verdict"]
    return Score(**{**record, "verdict": None if verdict is None else Verdict(verdict)})
