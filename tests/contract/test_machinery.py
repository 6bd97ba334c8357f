"""What a method's own machinery does in a run, worked out from what the engine sampled and from the data.

The engine's samples are written down as they come, and sometimes changed; what a run then reports must follow from
them by hand.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch
from method_runs import recipe_of, start
from tiny_runs import go, prepared

from truestep import rundir
from truestep.errors import UserError
from truestep.model.load import load_model
from truestep.records import Message, Problem, Prompt, Stop
from truestep.rollout.engine_torch import TorchEngine
from truestep.settings import ModelSettings
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.sequences import demonstration_sequence

torch.set_num_threads(1)
LIMIT = 3  # max_new_tokens of recipe_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory.mktemp("start"))


@dataclass
class Tape:
    """Every request and sample of an engine, by step. ``change`` may put something else in a sample's place."""

    change: Callable[[Any], Any] = lambda rollout: rollout
    steps: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    rounds: dict[int, list[list[str]]] = field(default_factory=lambda: defaultdict(list))

    def groups(self, step: int) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = defaultdict(list)
        for rollout in self.steps[step]:
            found[rollout.problem_id].append(rollout)
        return found


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    made, generate = Tape(), TorchEngine.generate

    def recording(self: TorchEngine, requests: Any, *rest: Any, **named: Any) -> Iterator[Any]:
        requests = list(requests)
        if requests and hasattr(requests[0], "step"):
            made.rounds[requests[0].step].append(list(dict.fromkeys(r.problem_id for r in requests)))
        for rollout in generate(self, requests, *rest, **named):
            changed = made.change(rollout)
            made.steps[requests[0].step].append(changed)
            yield changed

    monkeypatch.setattr(TorchEngine, "generate", recording)
    return made


def run(folder: Path, model: str, method: str, *sets: str, **given: Any) -> list[dict[str, float]]:
    """The metrics of a run of one stage, without the stage's name."""
    recipe = recipe_of(folder, model, method, **given)
    go(prepared(recipe, *sets), folder / "run")
    (stage,) = (folder / "run/stages").iterdir()
    return [
        {key.partition("/")[2] or key: value for key, value in row.items()}
        for row in rundir.read_jsonl(stage / "metrics.jsonl")
    ]


def rewards_of(folder: Path, model: str, rollouts: list[Any]) -> list[float]:
    """1 if the text of a sample is its problem's answer (an answer has one digit, the checker is exact)."""
    from truestep.data.chat import completion_text
    from truestep.model.load import load_tokenizer

    tokenizer = load_tokenizer(ModelSettings(path=model))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    answers = {row["id"]: row["answer"] for row in rows}
    return [
        float(completion_text(tokenizer, r.completion_ids).strip() == answers[r.problem_id]) for r in rollouts
    ]


# ------------------------------------------------------------------------------------------------- what is reported


def test_the_metrics_of_a_rollout_batch_follow_from_its_samples(
    model: str, tape: Tape, tmp_path: Path
) -> None:
    rows = run(tmp_path, model, "grpo_token_mean", steps=3)
    for step, row in enumerate(rows):
        groups = {name: rewards_of(tmp_path, model, g) for name, g in tape.groups(step).items()}
        flat, samples = [r for g in groups.values() for r in g], tape.steps[step]
        assert row["reward"] == pytest.approx(fmean(flat))
        assert row["reward_std"] == pytest.approx(pstdev(flat))
        assert row["solved_groups"] == fmean(any(g) for g in groups.values())
        assert row["mixed_groups"] == fmean(len(set(g)) > 1 for g in groups.values())
        assert row["completions/mean_length"] == pytest.approx(fmean(len(r.completion_ids) for r in samples))
        assert row["completions/truncated"] == fmean(r.stop is Stop.LENGTH for r in samples)
    # "any" and "all" of a group are told apart.
    assert any(row["mixed_groups"] > 0 for row in rows)


def test_the_gap_to_the_sampler_is_what_was_put_in(model: str, tape: Tape, tmp_path: Path) -> None:
    """Mean, largest value and k3 estimate of a known difference, over two updates with different ones."""
    gaps: dict[int, list[float]] = defaultdict(list)
    places: dict[str, int] = {}

    def change(rollout: Any) -> Any:
        place = places.setdefault(rollout.problem_id, len(places))
        gap = [0.1 * (place + 1) + 0.05 * i for i in range(len(rollout.completion_ids))]
        return replace(
            rollout,
            behavior_logprobs=tuple(b - g for b, g in zip(rollout.behavior_logprobs, gap, strict=True)),
        )

    tape.change = change
    (row,) = run(tmp_path, model, "grpo_token_mean", steps=1)
    order = tape.rounds[0][0]
    assert len(order) == 4
    for rollout in tape.steps[0]:  # the first two prompts are the first update's
        place = places[rollout.problem_id]
        gaps[order.index(rollout.problem_id) // 2] += [
            0.1 * (place + 1) + 0.05 * i for i in range(len(rollout.completion_ids))
        ]
    close = {"rel": 1e-4}  # float32
    assert row["sampling/logprob_difference_mean"] == pytest.approx(
        fmean(fmean(g) for g in gaps.values()), **close
    )
    assert row["sampling/logprob_difference_max"] == pytest.approx(
        max(max(g) for g in gaps.values()), **close
    )
    assert max(gaps[0]) != max(gaps[1])
    k3 = [fmean(math.exp(x) - 1 - x for x in g) for g in gaps.values()]
    assert row["sampling/kl"] == pytest.approx(fmean(k3), **close)


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1e9), (1 - 1e-9, 1e-9)])
def test_each_side_of_the_clip_has_its_own_rate(low: float, high: float, model: str, tmp_path: Path) -> None:
    options = f"stages.rl.method_options={{ clip_low = {low}, clip_high = {high} }}"
    rows = run(tmp_path, model, "grpo_token_mean", options, steps=3)
    total = {side: sum(row[f"clip_ratio/{side}"] for row in rows) for side in ("low", "high")}
    open_side, closed = ("high", "low") if low < 0.5 else ("low", "high")
    assert total[open_side] == 0
    assert total[closed] > 0


# ----------------------------------------------------------------------------------------------------- DAPO's refill


@pytest.mark.parametrize("fraction", [0.0, 0.75])
def test_dapo_trains_mixed_groups_with_half_a_point_for_length(
    fraction: float, model: str, tape: Tape, tmp_path: Path
) -> None:
    """All-equal groups are dropped and others asked for; the first update's loss by hand: −Σ A·log π ÷ tokens with
    A = (R − mean) / std of rewards that fall by ½ over the last part of the limit."""
    options = f"stages.rl.method_options={{ overlong_fraction = {fraction} }}"
    (row,) = run(tmp_path, model, "dapo", options, "stages.rl.updates_per_rollout=1", steps=1)
    groups = tape.groups(0)
    kept, value, tokens = [], 0.0, 0
    for name, rollouts in groups.items():
        rewards = rewards_of(tmp_path, model, rollouts)
        if len(set(rewards)) == 1:
            continue
        kept.append(name)
        spare = LIMIT * (1 - fraction)
        if fraction:
            rewards = [
                r - 0.5 * min(1.0, max(0.0, len(s.completion_ids) - spare) / (LIMIT - spare))
                for r, s in zip(rewards, rollouts, strict=True)
            ]
        advantages = [(r - fmean(rewards)) / (stdev(rewards) + 1e-6) for r in rewards]
        value -= sum(a * sum(s.behavior_logprobs) for a, s in zip(advantages, rollouts, strict=True))
        tokens += sum(len(s.completion_ids) for s in rollouts)
    first, *others = tape.rounds[0]
    dropped = [name for name in first if name not in kept]
    assert dropped, "no group was dropped: nothing to refill"
    assert len(others[0]) == len(dropped)
    asked = [name for names in tape.rounds[0] for name in names]
    assert len(asked) == len(set(asked)), "a prompt was asked twice"
    assert len(kept) <= 4
    assert row["num_tokens"] == tokens
    assert row["loss"] == pytest.approx(value / tokens, rel=1e-4)
    lengths = [{len(s.completion_ids) for s in groups[name]} for name in kept]
    assert any(len(found) > 1 for found in lengths), "all samples are of one length: the penalty cancels"


def test_every_refill_draws_another_order(model: str, tape: Tape, tmp_path: Path) -> None:
    """Nothing can be solved, so all four prompts are replaced: from the eight others, in an order of the step."""
    folder = tmp_path
    recipe = recipe_of(folder, model, "dapo", steps=4)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    names = [row["id"] for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(row | {"answer": "x"}) + "\n" for row in rows))
    go(prepared(recipe), folder / "run")
    orders = []
    for step in range(4):
        first, second, third = tape.rounds[step]
        rest = [name for name in names if name not in first]
        assert sorted(second + third) == sorted(rest)
        orders.append(tuple(rest.index(name) for name in second))
        last = [name for name in rest if name not in second]
        orders.append(tuple(last.index(name) for name in third))
    assert len(set(orders[0::2])) == 4
    assert len(set(orders[1::2])) > 1


# -------------------------------------------------------------------------------- stores, streams, rejection, identity


def test_replay_starts_after_the_step_that_reaches_its_threshold(model: str, tmp_path: Path) -> None:
    def losses(start_at: float) -> list[float]:
        options = f"stages.rl.method_options={{ replay_start = {start_at!r} }}"
        rows = run(tmp_path / str(start_at), model, "exgrpo", options, steps=2)
        rates.append(rows[0]["reward"])
        return [row.get("loss/replay", 0.0) for row in rows]

    rates: list[float] = []
    assert losses(1.0) == [0.0, 0.0]
    rate = rates[0]
    assert 0 < rate < 1
    exactly, above = losses(rate), losses(rate + 1e-6)
    assert exactly[0] == 0
    assert exactly[1] != 0
    assert above == [0.0, 0.0]


def test_a_stored_sample_is_chosen_by_its_mean_entropy(model: str) -> None:
    """Per token, so that a long sample is not uncertain for its length; each as if it were scored by itself."""
    loaded = load_model(ModelSettings(path=model), dtype=torch.float64, device=torch.device("cpu"), seed=0)
    policy = Policy(loaded)
    scorer = Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=12)
    problem = Problem(id="p", messages=(Message(role="user", content="?"),), answer="1")
    prompt = Prompt(problem=problem, token_ids=(5, 6, 7))
    found, _ = scorer.entropy([demonstration_sequence(prompt, (8, 9, 10, 4)[:n], n) for n in (1, 4, 2)], 0)
    for number, mean in zip((1, 4, 2), found, strict=True):
        ids = torch.tensor([[5, 6, 7, 8, 9, 10, 4][: 3 + number]])
        with torch.no_grad():
            logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 2:-1]
        expected = torch.distributions.Categorical(logits=logits.double()).entropy()
        assert expected.numel() == number
        assert mean == pytest.approx(float(expected.mean()), rel=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_stream_is_that_share_of_the_sequences(share: float, model: str, tmp_path: Path) -> None:
    """Every demonstration has two tokens: its digit and the end."""
    options = f"stages.rl.method_options={{ stream_share = {share} }}"
    (row,) = run(tmp_path, model, "chord_mu", options, "stages.rl.updates_per_rollout=1", steps=1)
    streamed, sampled = row["work/demonstration_tokens"] / 2, 16
    assert streamed / (streamed + sampled) == pytest.approx(share)


def test_rejection_sampling_keeps_no_truncated_sample(model: str, tape: Tape, tmp_path: Path) -> None:
    """With a limit of one token a right sample is a truncated one."""
    recipe = recipe_of(tmp_path, model, "grpo_token_mean")
    text = recipe.read_text()
    stage = """[[stages]]
kind = "rejection"
data = "train"
steps = 1
samples_per_prompt = 8
sequences_per_step = 1
tokens_per_microbatch = 96
optimizer = { lr = 5e-3 }
sampling = { max_new_tokens = %d, max_running = 8 }
"""
    before = text.partition("[[stages]]")[0]
    recipe.write_text(before + stage % 1)
    with pytest.raises(UserError, match="only 0 of 96 samples were kept"):
        go(prepared(recipe), tmp_path / "short")
    samples = [r for rollouts in tape.steps.values() for r in rollouts]
    right = rewards_of(tmp_path, model, samples)
    assert sum(right) > 0
    assert all(r.stop is Stop.LENGTH for r, reward in zip(samples, right, strict=True) if reward)
    recipe.write_text(before + stage % 2)
    go(prepared(recipe), tmp_path / "long")
    assert rundir.read_json(tmp_path / "long/stages/01-rejection/rejection.json")["kept"] > 0


def test_another_dev_set_is_another_stage(model: str, tmp_path: Path) -> None:
    more = 'dev = { data = "dev", every_steps = 2 }\n[data.dev]\nsource = "dev.jsonl"'
    recipe = recipe_of(tmp_path, model, "sft", more=more)
    row = {"id": "d", "problem": "1+1", "answer": "0", "checker": "exact"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    go(prepared(recipe), tmp_path / "run")
    go(prepared(recipe), tmp_path / "run", resume=True)
    (tmp_path / "dev.jsonl").write_text(json.dumps(row | {"answer": "1"}) + "\n")
    with pytest.raises(UserError, match=r"begun with other rows of data\.dev"):
        go(prepared(recipe), tmp_path / "run", resume=True)
