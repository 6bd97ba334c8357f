"""Every metric's value, worked out on paper for a few tokens and samples. A key of the table that has no value in this
file fails here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from step_cases import PLAIN_SGD, plan_for
from torch import Tensor, nn

from truestep.flops import Ledger, sequence_work
from truestep.objective.advantage import own_mean
from truestep.objective.methods import Method, build
from truestep.objective.methods.mixed import imitation_term
from truestep.objective.methods.rl import clipped_term
from truestep.objective.methods.row import POLICY, DemonstrationBuffer, Statistic
from truestep.objective.normalise import Normaliser
from truestep.records import (
    NOT_SAMPLED,
    Distribution,
    Group,
    Origin,
    Rollout,
    Score,
    Stop,
    TokenBatch,
    TrainSequence,
    Verdict,
    judged,
)
from truestep.train import ahead, metrics, sequences, update
from truestep.train.memory import first_memory
from truestep.train.metrics import METRICS, Meter, checked, metric
from truestep.train.optim import MasterOptimizer
from truestep.train.packing import pack
from truestep.train.parallel import Ranks
from truestep.train.scoring import Scorer
from truestep.train.source import StepData
from truestep.train.step import train_step
from truestep.train.update import Updater

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "unit"), str(HERE.parent / "contract")]

from method_runs import recipe_of, start  # noqa: E402
from test_buffers import source  # noqa: E402
from test_source import ScriptedEngine, prompts  # noqa: E402
from tiny_runs import go, prepared  # noqa: E402

LN2 = math.log(2)
# Of the tokens 0 … 7, the first of which is context: the policy, the proximal policy, what sampled, the reference.
POLICY_P = torch.tensor([1, 1 / 2, 1 / 4, 1 / 2, 1 / 8, 1 / 4, 1 / 2, 1 / 2], dtype=torch.float64)
PROXIMAL_P = torch.tensor([1, 1 / 2, 1 / 8, 1, 1 / 8, 1 / 4, 1 / 4, 1 / 2], dtype=torch.float64)
BEHAVIOR_P = torch.tensor([1, 1 / 4, 1 / 8, 1, 1 / 2, 1, 1 / 4, 1 / 32], dtype=torch.float64)
REFERENCE_P = torch.tensor([1, 1 / 4, 1 / 4, 1 / 2, 1 / 8, 1 / 4, 1 / 2, 1 / 2], dtype=torch.float64)
ENTROPY = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.7, 0.6, 0.8], dtype=torch.float64)


class Table(nn.Module):
    """A policy that knows these tokens only. Its log-probabilities are linear in its one parameter, so that the
    gradient of a step is the step's loss."""

    saves_memory, packs = False, True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
        return self.scale * POLICY_P.log()[batch.target_ids], ENTROPY[batch.target_ids]


def sequence(origin: Origin, *tokens: int, advantage: float = 0.0) -> TrainSequence:
    behavior = tuple(float(x) for x in BEHAVIOR_P.log()[list(tokens)])
    return TrainSequence(
        token_ids=(0, *tokens),
        origin=(Origin.CONTEXT,) + (origin,) * len(tokens),
        num_prefix_tokens=0,
        group=0,
        advantage=advantage,
        behavior_logprobs=None if origin is Origin.EXPERT else behavior,
    )


RIGHT = sequence(Origin.POLICY, 1, 2, 6, advantage=1.0)
WRONG = sequence(Origin.POLICY, 3, 4, advantage=-1.0)
SHOWN = sequence(Origin.EXPERT, 5)
REPLAYED = sequence(Origin.STORED, 7, advantage=1.0)


def of_one_update(method: Method, *, first: bool = False, limit: int = 3) -> dict[str, float]:
    """The row of an update; ``first``: of a rollout batch's first, where the policy is the proximal policy."""
    batches = pack([RIGHT, WRONG, SHOWN, REPLAYED], tokens_per_microbatch=limit, dtype=torch.float64)
    assert len(batches) == (1 if limit > 7 else 3)
    filled = []
    for batch in batches:
        ids = batch.target_ids
        filled.append(replace(batch, reference_logprobs=REFERENCE_P.log()[ids]))
        if not first:
            filled[-1] = replace(filled[-1], proximal_logprobs=PROXIMAL_P.log()[ids])
    policy: Any = Table()
    plan = plan_for(method, learning_rate=1e-18)
    return update._row(train_step(policy, MasterOptimizer(policy, PLAIN_SGD), filled, plan))


KL = {"kl": "k3", "kl_coef": 0.5}
CORRECTED = {"correction": "drop", "correction_low": 0.4, "correction_high": 3.0}


def one_update(limit: int = 3) -> dict[str, float]:
    """GRPO with a correction and a KL term, and imitation."""
    row = build("grpo", {**KL, **CORRECTED})
    return of_one_update(replace(row, terms=(*row.terms, imitation_term())), limit=limit)


# The ratios of the five sampled tokens 1 2 6 | 3 4 are 1 2 2 | 1/2 1: two are clipped above, one below. Engine and
# proximal policy differ by ln 2 at token 1 and by −2 ln 2 at token 4, whose weight of 1/4 is dropped.
ONE_UPDATE = {
    "loss": (1 / 3 - 1 / 20 + 2) * LN2,
    "loss/policy": LN2 / 3,  # token 1: 2·ln 2 ÷ (3 tokens · 2 sequences)
    "loss/kl": -LN2 / 20,  # token 1: C = −(1 − 1/2), 0.5 · (−½ ln 2) ÷ 5 tokens
    "loss/sft": 2 * LN2,  # token 5
    "grad_norm": (1 / 3 - 1 / 20 + 2) * LN2,
    "learning_rate": 1e-18,
    "num_tokens": 7.0,
    "entropy": (0.1 + 0.2 + 0.6 + 0.3 + 0.4 + 0.8) / 6,
    "nll": (1 + 2 + 1 + 1 + 3 + 1) * LN2 / 6,
    "expert/entropy": 0.7,
    "expert/nll": 2 * LN2,
    "expert/share": 1 / 7,
    "clip_ratio/low": 1 / 5,
    "clip_ratio/high": 2 / 5,
    "correction/dropped": 1 / 5,
    "approx_kl": (3 / 2 - LN2) / 5,  # 2(1 − ln 2) + (1/2 − 1 + ln 2)
    "sampling/logprob_difference_mean": 3 * LN2 / 5,
    "sampling/logprob_difference_max": 2 * LN2,
    "sampling/kl": (1 / 4 + LN2) / 5,  # (2 − 1 − ln 2) + (1/4 − 1 + 2 ln 2)
}


def two_updates() -> dict[str, float]:
    """A step of two updates, a statistic, and a buffer's own update, by the whole Updater. The learning rate moves
    nothing that float64 can hold (1 − 1e-18 is 1)."""
    policy: Any = Table()
    method = Method(
        name="hand",
        terms=(clipped_term(0.2, 0.2, Normaliser.TOKENS), imitation_term()),
        statistics=(Statistic(name="gain", select=POLICY, values=lambda c: c.advantage, reduce="mean"),),
        parts=(DemonstrationBuffer(size=1, lr=1e-18, max_grad_norm=0.0),),
    )
    main = MasterOptimizer(policy, PLAIN_SGD)
    updater = Updater(
        policy=policy,
        scorer=Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=3),
        method=method,
        optimizers={
            "optimizer": main,
            "buffer-optimizer": MasterOptimizer(
                policy, PLAIN_SGD.model_copy(update={"lr": 1e-18}), beside=main
            ),
        },
        learning_rate=lambda number: (number + 1) * 1e-18,
        updates_per_step=2,
    )
    data = StepData(minibatches=[[RIGHT, SHOWN], [WRONG]], buffered=[sequence(Origin.EXPERT, 5, 5)])
    return dict(updater.update(data, 0).metrics)


# All ratios are 1. First update: −Σ log π / 3 = 4/3 ln 2, and 2 ln 2 of token 5; second: +Σ log π / 2 = −2 ln 2. The
# differences to the engine are ln 2 three times, then −ln 2 and −2 ln 2.
TWO_UPDATES = {
    "loss": (10 / 3 - 2) / 2 * LN2,
    "loss/policy": (4 / 3 - 2) / 2 * LN2,
    "loss/sft": (2 + 0) / 2 * LN2,
    "grad_norm": (10 / 3 + 2) / 2 * LN2,
    "learning_rate": 2e-18,  # of the last
    "num_tokens": 4 + 2.0,
    "entropy": (0.3 + 0.35) / 2,
    "nll": (4 / 3 + 2) / 2 * LN2,
    "expert/entropy": 0.7,  # only the first update has the expert's tokens
    "expert/nll": 2 * LN2,
    "expert/share": 1 / 4,
    "clip_ratio/low": 0.0,
    "clip_ratio/high": 0.0,
    "approx_kl": 0.0,
    "sampling/logprob_difference_mean": (1 + 3 / 2) / 2 * LN2,
    "sampling/logprob_difference_max": 2 * LN2,
    "sampling/kl": ((1 - LN2) + (-5 / 4 + 3 * LN2) / 2) / 2,
    "statistics/gain": (3 - 2) / 5,
    "buffer/loss": 2 * LN2,
    "buffer/grad_norm": 2 * LN2,
}


def sampled(num: int, *, stop: Stop = Stop.STOP_TOKEN, origin: Origin = Origin.POLICY) -> Rollout:
    return Rollout(
        problem_id="p0",
        sample_index=0,
        completion_ids=(1,) * num,
        origin=(origin,) * num,
        policy_version=(NOT_SAMPLED,) * num,
        behavior_logprobs=None,
        distribution=Distribution(temperature=1.0),
        stop=stop,
        error="out of memory" if stop is Stop.ERROR else "",
    )


def worth(reward: float, verdict: Verdict | None, **parts: float) -> Score:
    return Score(reward=reward, verdict=verdict, parts=parts)


FAILED = Score(reward=None, verdict=None, parts={"short": 0.75}, reason="length: it raised", failed=True)
GROUPS = (
    (
        (sampled(2), worth(1.0, Verdict.CORRECT, short=0.5)),
        (sampled(3), replace(worth(0.0, Verdict.INCORRECT, short=0.25), unreadable=True)),
        (sampled(0, stop=Stop.ERROR), FAILED),
        (sampled(9, origin=Origin.EXPERT), worth(7.0, Verdict.CORRECT, short=9.0)),
    ),
    (
        (sampled(5, stop=Stop.LENGTH), worth(0.5, None, short=0.5)),
        (sampled(4), worth(0.5, None, short=0.5)),
        (sampled(9, origin=Origin.EXPERT), judged(Verdict.INCORRECT)),
        (sampled(9, origin=Origin.STORED), worth(1.0, Verdict.CORRECT, short=9.0)),
    ),
)


def of_groups() -> dict[str, float]:
    """Two groups of 3 and 2 own samples, and what is beside them."""
    (prompt,) = prompts(1)
    meter, method = Meter(), Method(name="hand", terms=(imitation_term(),), advantage=own_mean)
    for members in GROUPS:
        rollouts, scores = zip(*members, strict=True)
        group = Group(prompt=prompt, rollouts=rollouts, scores=scores)
        metrics.of_groups(meter, [sequences.gated(group, method, 1.0)])
    return meter.reduce(Ranks())


OF_GROUPS = {
    "reward": (1 + 0 + 0.5 + 0.5) / 4,
    "reward_std": math.sqrt((1 + 0 + 0.25 + 0.25) / 4 - 0.25),
    "reward/short": (0.5 + 0.25 + 0.75 + 0.5 + 0.5) / 5,
    "reward_failures": 1 / 5,
    "solved": 1 / 4,
    "mixed_groups": 1 / 2,
    "solved_groups": 1 / 2,
    "unscored": 1 / 5,
    "unreadable": 1 / 5,
    "completions/mean_length": (2 + 3 + 0 + 5 + 4) / 5,
    "completions/truncated": 1 / 5,
    "demonstrations/correct": 1 / 2,
}


def of_memories() -> dict[str, float]:
    """What three methods remember after their first step over four prompts."""
    found: dict[str, float] = {}
    wrong, one_right = ScriptedEngine(lambda r: 8), ScriptedEngine(lambda r: 7 if r.sample_index == 0 else 8)
    for name, engine, options in (
        ("relift", wrong, {"buffer_size": 5}),
        ("exgrpo", one_right, {"replay_start": 0.0}),
        ("super_rl", wrong, {"learned_weights": True}),
    ):
        made = source(name, engine, options).take(0, first_memory(build(name, options)))
        found |= {
            k: v for k, v in made.metrics.items() if k.partition("/")[0] in ("buffer", "replay", "control")
        }
    return found


OF_MEMORIES = {
    "buffer/waiting": 4.0,
    "replay/problems": 4.0,
    "control/policy": 1.0,  # e^(−2·0)
    "control/imitation": math.exp(-2),
}


def of_older_samples() -> dict[str, float]:
    """In step 5, three tokens of version 4, one of version 2, and tokens that no policy of this batch sampled."""
    own, meter = (Origin.CONTEXT, Origin.POLICY), Meter()
    one: dict[str, Any] = {"token_ids": (1, 2, 3), "num_prefix_tokens": 1, "group": 0}
    mixed = (Origin.CONTEXT, Origin.EXPERT, Origin.POLICY)
    parts = [
        TrainSequence(**one, origin=(*own, Origin.POLICY), policy_version=4),
        TrainSequence(**one, origin=mixed, policy_version=(NOT_SAMPLED, 4)),
        TrainSequence(**one, origin=(Origin.CONTEXT, Origin.STORED, Origin.POLICY), policy_version=(0, 2)),
    ]
    sequences.of_versions(meter, [parts[:2], parts[2:]], 5)
    changed = ahead.as_change(one_update())
    return meter.reduce(Ranks()) | {k: v for k, v in changed.items() if k.startswith("sampling/")}


OF_OLDER_SAMPLES = {
    "sampling/staleness": (3 * 1 + 3) / 4,
    "sampling/policy_change_mean": ONE_UPDATE["sampling/logprob_difference_mean"],
    "sampling/policy_change_max": ONE_UPDATE["sampling/logprob_difference_max"],
    "sampling/policy_change_kl": ONE_UPDATE["sampling/kl"],
}

ON_PAPER: dict[str, tuple[Callable[[], dict[str, float]], Mapping[str, float]]] = {
    "one update": (one_update, ONE_UPDATE),
    "two updates": (two_updates, TWO_UPDATES),
    "groups": (of_groups, OF_GROUPS),
    "memories": (of_memories, OF_MEMORIES),
    "older samples": (of_older_samples, OF_OLDER_SAMPLES),
}
# Computed apart from a run, by the last tests of this file.
OF_SETS = (
    "data_rows/a",
    "data_nll/a",
    "data_reward/a",
    "data_solved/a",
)  # tests/contract/test_several_sets.py
OF_A_RUN = (
    *OF_SETS,
    "dev/score",
    "validation/loss",
    "work/demonstration_tokens",
    "flops_paper",
    "flops_full",
)


def test_every_metric_has_its_value_in_this_file() -> None:
    keys = [key for _, expected in ON_PAPER.values() for key in expected] + list(OF_A_RUN)
    assert {metric(key).key for key in keys} == set(METRICS)


def compare(name: str) -> None:
    run, expected = ON_PAPER[name]
    assert run() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", list(ON_PAPER))
def test_a_metric_is_what_it_is_on_paper(name: str) -> None:
    compare(name)


def test_micro_batches_do_not_matter() -> None:
    assert one_update(limit=100) == pytest.approx(ONE_UPDATE, rel=1e-12)


# ------------------------------------------------------------------------------------------------------- mutants

Patch = pytest.MonkeyPatch


def sides_exchanged(patch: Patch) -> None:
    original = metrics.of_clipping
    patch.setattr(
        metrics, "of_clipping", lambda meter, c, advantage, mask: original(meter, c, -advantage, mask)
    )


def all_instead_of_any(patch: Patch) -> None:
    patch.setattr(metrics, "any", all, raising=False)


def combined(key: str, **changed: str) -> Callable[[Patch], None]:
    return lambda patch: patch.setitem(METRICS, key, replace(METRICS[key], **changed))


MUTANTS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "clip_ratio/low taken from high": (sides_exchanged, "one update"),
    "solved_groups of all": (all_instead_of_any, "groups"),
    "a largest value averaged": (combined("sampling/logprob_difference_max", across="mean"), "two updates"),
    "the first learning rate": (combined("learning_rate", across="mean"), "two updates"),
    "tokens averaged": (combined("num_tokens", across="mean"), "two updates"),
    "a largest value summed": (combined("sampling/logprob_difference_max", within="sum"), "one update"),
    "a mean summed": (combined("entropy", within="sum"), "one update"),
    "a loss averaged over micro-batches": (combined("loss/{term}", within="mean"), "one update"),
    "a spread that is a mean": (combined("reward_std", within="mean"), "groups"),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_wrong_metric_is_seen(name: str, monkeypatch: Patch) -> None:
    install, where = MUTANTS[name]
    install(monkeypatch)
    with pytest.raises(AssertionError):
        compare(where)


def test_an_unknown_key_is_an_error() -> None:
    for key in ("rewards", "loss", "loss/", "lost/policy", "work"):
        if key in METRICS or metric_or_none(key):
            continue
        for use in (Meter().add, lambda k, v: checked({k: v}), lambda k, v: metrics.combine([{k: v}])):
            with pytest.raises(KeyError, match=f"'{key}' is not a metric; add it to the table"):
                use(key, 1.0)
        with pytest.raises(KeyError):
            Meter(key)
    assert list(checked({"nll": 1.0, "loss/policy": 2.0, "entropy": 3.0})) == [
        "entropy",
        "loss/policy",
        "nll",
    ]


def metric_or_none(key: str) -> Any:
    try:
        return metric(key)
    except KeyError:
        return None


# ---------------------------------------------------------------------------------------------- clipped surrogates


def clip_ratios(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("clip_ratio/")}


def test_a_kl_term_is_not_clipped() -> None:
    """Its coefficient is 0 wherever policy and reference agree."""
    plain, with_kl = (clip_ratios(of_one_update(build("grpo", options))) for options in ({}, KL))
    assert plain == with_kl == {"clip_ratio/low": 1 / 5, "clip_ratio/high": 2 / 5}


def test_nothing_is_clipped_at_the_first_update() -> None:
    assert "loss/kl" in (row := of_one_update(build("uft", {}), first=True))
    assert clip_ratios(row) == {"clip_ratio/low": 0.0, "clip_ratio/high": 0.0}


@pytest.mark.parametrize("name", ["rloo", "cispo", "sapo", "nft", "sft"])
def test_without_a_clip_there_is_no_clip_ratio(name: str) -> None:
    assert clip_ratios(of_one_update(build(name, {}))) == {}


def test_a_correction_of_samples_is_not_diluted_by_other_tokens() -> None:
    """Luffy's second term selects the expert's tokens: they are no samples whose correction could be dropped."""
    assert of_one_update(build("luffy", CORRECTED))["correction/dropped"] == 1 / 5


def test_without_a_trained_token_there_is_nothing_to_measure() -> None:
    policy: Any = Table()
    row = update._row(train_step(policy, MasterOptimizer(policy, PLAIN_SGD), [], plan_for(build("grpo", {}))))
    assert row == {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1.0, "num_tokens": 0.0}


# ------------------------------------------------------------------------------------------------------------ a run

STEPS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[dict[str, float]]]]:
    """An SFT stage that sees all twelve demonstrations in each step, and an RL stage with a dev set."""
    folder = tmp_path_factory.mktemp("metrics")
    model = start(folder / "start")
    found = {}
    more = f'dev = {{ data = "dev", every_steps = {STEPS}, samples_per_problem = 2 }}'
    more += '\n[data.dev]\nsource = "dev.jsonl"\n'
    for method, kind, extra in (("sft", "sft", ""), ("grpo_token_mean", "rl", more)):
        recipe = recipe_of(folder / kind, model, method, steps=STEPS, more=extra)
        recipe.write_text(recipe.read_text().replace("sequences_per_step = 8", "sequences_per_step = 12"))
        rows = [
            {"id": f"d{i}", "problem": f"{i}+5", "answer": str(i % 2), "checker": "exact"} for i in range(12)
        ]
        (folder / kind / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        go(prepared(recipe), folder / kind / "run")
        stage = folder / kind / "run/stages" / f"01-{kind}"
        lines = (stage / "metrics.jsonl").read_text().splitlines()
        found[kind] = (
            stage,
            [{k.removeprefix(f"{kind}/"): v for k, v in json.loads(x).items()} for x in lines],
        )
        assert len(found[kind][1]) == STEPS
    return found


def test_every_key_of_a_run_is_in_the_table(run: Mapping[str, Any]) -> None:
    for _, rows in run.values():
        assert all(metric(key) for row in rows for key in row if key != "step")


def test_work_is_counted_from_lengths(run: Mapping[str, Any]) -> None:
    """Twelve prompts of "N+N" with an answer of one digit and a stop token, as a chat of the tiny tokenizer."""
    _, rows = run["sft"]
    lengths = [len(f"{i}+{(i * 7) % 4}") + 3 for i in range(12)]  # <|user|> … <|end|><|assistant|>
    once = sum((sequence_work(num, 2) for num in lengths), Ledger())
    for number, row in enumerate(rows, start=1):
        work = {k.removeprefix("work/"): v for k, v in row.items() if k.startswith("work/")}
        assert work == vars(once.times(number))
        assert row["work/demonstration_tokens"] == 24 * number == row["num_tokens"] * number
    generated = 0.0
    for row in run["rl"][1]:
        generated += 16 * row["completions/mean_length"]
        assert row["work/rollout_tokens"] == pytest.approx(generated)


def test_flops_follow_from_work(run: Mapping[str, Any]) -> None:
    for stage, rows in run.values():
        tensors = load_file(stage / "export/model.safetensors")
        num = sum(t.numel() for t in tensors.values())
        embedding = next(t.numel() for name, t in tensors.items() if "embed_tokens" in name)
        tied = not any("lm_head" in name for name in tensors)
        products = num - (0 if tied else embedding)  # a tied embedding is the head, too
        for row in rows:
            w = {k.removeprefix("work/"): v for k, v in row.items() if k.startswith("work/")}
            paper = 6 * w["demonstration_tokens"] + 2 * w["rollout_tokens"] + 6 * w["rollout_trained_tokens"]
            assert row["flops_paper"] == pytest.approx(num * paper, rel=1e-12)
            passes = 6 * w["trained_pass_tokens"] + 2 * (w["generated_pass_tokens"] + w["scored_pass_tokens"])
            pairs = 3 * w["trained_pairs"] + w["generated_pairs"] + w["scored_pairs"]
            layers, width = 1, 32
            assert row["flops_full"] == pytest.approx(
                products * passes + 4 * layers * width * pairs, rel=1e-12
            )


def test_the_dev_score_is_the_share_of_right_samples(run: Mapping[str, Any]) -> None:
    stage, rows = run["rl"]
    assert ["dev/score" in row for row in rows] == [False, True]
    (path,) = (stage / "dev" / f"step_{STEPS:08d}").glob("*.samples.jsonl")
    verdicts = [json.loads(line).get("verdict") for line in path.read_text().splitlines()][1:]
    assert len(verdicts) == 24
    assert rows[-1]["dev/score"] == verdicts.count("correct") / 24


def test_a_token_without_an_advantage_is_not_clipped() -> None:
    meter = Meter()
    advantage, sampled = torch.tensor([-1.0, 0.0, 2.0, 3.0]), torch.tensor([True, True, True, False])
    metrics.of_clipping(meter, torch.zeros(4), advantage, sampled)
    assert meter.reduce(Ranks()) == pytest.approx({"clip_ratio/low": 1 / 3, "clip_ratio/high": 1 / 3})


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_expert_has_keys_of_its_own_only_beside_samples(share: float) -> None:
    row = {"entropy": 0.5, "nll": 1.5, "expert/entropy": 2.0, "expert/nll": 3.0, "expert/share": share}
    own = {"entropy": 0.5, "nll": 1.5}
    wanted = {0.0: own, 0.25: row, 1.0: {"entropy": 2.0, "nll": 3.0}}
    assert metrics.with_expert(row) == wanted[share]
