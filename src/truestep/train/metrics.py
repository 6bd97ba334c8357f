"""The metrics of a training stage, with the name, reduction and meaning of each.

A key is written to ``metrics.jsonl`` as ``STAGE/KEY``. docs/metrics.md and the panels of the report page are
made from the table below; a key that is not in the table is an error. The metrics of rollouts and tokens are
computed at the end of this file. torch is not imported here, because the report reads the table too.
Held by: tests/numerics/test_metrics.py (a group with a few tokens, calculated by hand)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truestep.records import Origin, Stop, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from truestep.objective.coefficients import Context
    from truestep.train.parallel import Ranks
    from truestep.train.sequences import GatedGroup


@dataclass(frozen=True)
class Metric:
    """A metric. ``within`` says how an update's values are combined over micro-batches and ranks:
    mean (Σ value ÷ Σ count), std (of the values, biased), sum, max, or once (the same on every rank).
    ``across`` says how the updates of a step are combined: mean, sum, max or last. ``panel`` is the report's
    panel and the curve's name in it. ``elsewhere`` is the name in TRL and, after a semicolon, in verl."""

    key: str
    within: str
    across: str
    unit: str
    panel: str
    elsewhere: str
    meaning: str


# fmt: off
_ROWS = (
    # key, within, across, unit, panel: label, name in TRL; in verl, meaning
    ("reward", "mean", "mean", "reward", "Reward: reward", "reward; critic/rewards/mean", "mean over scored samples"),
    ("reward_std", "std", "mean", "reward", "Reward spread: standard deviation", "reward_std",
     "standard deviation over scored samples (biased)"),
    ("reward/{part}", "mean", "mean", "reward", "Reward parts: {part}", "rewards/NAME/mean",
     "mean of one part of the reward, before its weight"),
    ("reward_failures", "mean", "mean", "share", "", "", "share of samples that a reward function failed to score"),
    ("solved", "mean", "mean", "share", "", "", "share of scored samples that solve their problem"),
    ("mixed_groups", "mean", "mean", "share", "Groups with mixed rewards: share", "1 − frac_reward_zero_std",
     "share of groups in which the policy's samples do not all have the same reward"),
    ("solved_groups", "mean", "mean", "share", "", "",
     "share of groups in which at least one sample of the policy solves the problem"),
    ("unscored", "mean", "mean", "share", "Unscored samples: share", "", "share of samples without a reward"),
    ("unreadable", "mean", "mean", "share", "Unreadable answers: share", "",
     "share of samples whose answer is incorrect because it could not be read"),
    ("completions/mean_length", "mean", "mean", "tokens", "Completion length: mean",
     "completions/mean_length; response_length/mean", "mean length of the sampled completions"),
    ("completions/truncated", "mean", "mean", "share", "Truncated completions: share",
     "completions/clipped_ratio; response_length/clip_ratio", "share of samples stopped by the length limit"),
    ("demonstrations/correct", "mean", "mean", "share", "", "",
     "share of the groups' demonstrations that the checker accepts"),
    ("data_rows/{name}", "once", "sum", "rows", "Data sets, rows of a step: {name}", "",
     "number of sequences (SFT) or prompts (RL) of one data set, if the stage has several"),
    ("data_nll/{name}", "mean", "mean", "nats", "Data sets, −log π: {name}", "",
     "−log π at the trained tokens of one data set, if the stage has several"),
    ("data_reward/{name}", "mean", "mean", "reward", "Data sets, reward: {name}", "",
     "mean reward over the scored samples of one data set, if the stage has several"),
    ("data_solved/{name}", "mean", "mean", "share", "", "",
     "share of scored samples of one data set that solve their problem, if the stage has several"),
    ("dev/score", "once", "mean", "share", "Dev score: score", "", "score on the stage's dev set"),
    ("validation/loss", "once", "mean", "nats", "Validation loss: loss", "eval_loss; val/loss",
     "mean −log π over all trained tokens of the stage's validation set, after the step"),
    ("loss", "sum", "mean", "nats", "Loss: loss", "loss; actor/pg_loss",
     "the value that is differentiated: for SFT, the token-mean NLL; for RL, −Σ C·log π / Z, a surrogate of which "
     "only the gradient matters"),
    ("loss/{term}", "sum", "mean", "nats", "", "", "one term's part of the loss, if the method has several terms"),
    ("grad_norm", "once", "mean", "", "Gradient norm: norm", "grad_norm; actor/grad_norm",
     "global norm of the gradient before clipping"),
    ("learning_rate", "once", "last", "", "Learning rate: rate", "learning_rate; actor/lr",
     "learning rate of the step's last update"),
    ("num_tokens", "once", "sum", "tokens", "", "num_tokens", "number of trained tokens over all ranks"),
    ("entropy", "mean", "mean", "nats", "Entropy: entropy", "entropy; actor/entropy",
     "entropy of the policy at the sampled tokens (at all trained tokens if none were sampled)"),
    ("nll", "mean", "mean", "nats", "", "", "−log π at the tokens that `entropy` covers"),
    ("expert/entropy", "mean", "mean", "nats", "", "", 
     "entropy at the expert's tokens, if sampled tokens are also trained on"),
    ("expert/nll", "mean", "mean", "nats", "", "", 
     "−log π of the expert's tokens, if sampled tokens are also trained on"),
    ("expert/share", "mean", "mean", "share", "", "", 
     "share of trained tokens that are the expert's, if sampled tokens are also trained on"),
    ("clip_ratio/low", "mean", "mean", "share", "Clipped tokens: low",
     "clip_ratio/low_mean; actor/pg_clipfrac_lower", "share of sampled tokens that are clipped and have A < 0"),
    ("clip_ratio/high", "mean", "mean", "share", "Clipped tokens: high",
     "clip_ratio/high_mean; actor/pg_clipfrac", "share of sampled tokens that are clipped and have A > 0"),
    ("correction/dropped", "mean", "mean", "share", "", "; rollout_corr/*",
     "share of sampled tokens whose correction for the difference between engine and trainer is 0"),
    ("approx_kl", "mean", "mean", "nats", "", "; actor/ppo_kl", "k3 estimate of KL(proximal ‖ policy) at sampled tokens"),
    ("sampling/logprob_difference_mean", "mean", "mean", "nats", "Log-prob gap to sampler: mean",
     "sampling/sampling_logp_difference/mean; rollout_corr/*",
     "|log π_proximal − log π_engine| at sampled tokens (with rollout_ahead: |log π − log π_engine| at some tokens "
     "that the engine sampled with the weights of this step's samples, π being the trainer with the same weights)"),
    ("sampling/logprob_difference_max", "max", "max", "nats", "Log-prob gap to sampler: max",
     "sampling/sampling_logp_difference/max; rollout_corr/*",
     "largest |log π_proximal − log π_engine| at sampled tokens (with rollout_ahead: at the tokens of the mean)"),
    ("sampling/kl", "mean", "mean", "nats", "KL to sampler: KL", "; rollout_corr/k3_kl",
     "k3 estimate of KL(engine ‖ proximal) at sampled tokens (with rollout_ahead: at the tokens of the mean)"),
    ("sampling/staleness", "mean", "mean", "versions", "Staleness: versions", "",
     "with rollout_ahead, how many versions older than the step's weights the weights are that sampled its tokens"),
    ("sampling/policy_change_mean", "mean", "mean", "nats", "Policy change since sampling: mean", "",
     "with rollout_ahead, |log π_proximal − log π_engine| at sampled tokens: the change of the policy since they were "
     "sampled, and the gap between engine and trainer"),
    ("sampling/policy_change_max", "max", "max", "nats", "Policy change since sampling: max", "",
     "with rollout_ahead, largest |log π_proximal − log π_engine| at sampled tokens"),
    ("sampling/policy_change_kl", "mean", "mean", "nats", "", "",
     "with rollout_ahead, k3 estimate of KL(engine ‖ proximal) at sampled tokens"),
    ("statistics/{name}", "once", "mean", "", "", "", "a statistic of the whole step that a coefficient reads"),
    ("control/{name}", "once", "mean", "", "", "", "a value that the method's controller sets for this step"),
    ("buffer/waiting", "once", "mean", "problems", "", "", "number of demonstrations waiting in the buffer"),
    ("buffer/loss", "once", "mean", "nats", "", "", "loss in the buffer's separate update"),
    ("buffer/grad_norm", "once", "mean", "", "", "", "gradient norm in the buffer's separate update"),
    ("replay/problems", "once", "mean", "problems", "", "", "number of problems with a stored sample"),
    ("work/{kind}", "once", "mean", "count", "", "", "number of tokens or query-key pairs of each kind in the run so far"),
    ("flops_paper", "once", "mean", "FLOPs", "", "", "FLOPs of the run so far, by the paper's formula"),
    ("flops_full", "once", "mean", "FLOPs", "", "", "FLOPs of the run so far, including prompts, scoring and attention"),
)
# fmt: on
METRICS = {row[0]: Metric(*row) for row in _ROWS}


def metric(key: str) -> Metric:
    """Return the entry for a key (``loss/{term}`` for ``loss/policy``). Raises KeyError if there is none."""
    if key in METRICS:
        return METRICS[key]
    family = key.partition("/")[0]
    found = next((m for name, m in METRICS.items() if name.startswith(f"{family}/{{")), None)
    if found is None or "/" not in key:
        raise KeyError(f"{key!r} is not a metric; add it to the table in train/metrics.py")
    return found


class Meter:
    """Collects the metrics of one update, or of one rollout batch, on this rank. Each of ``keys`` is reported
    as 0 if nothing is added for it."""

    def __init__(self, *keys: str) -> None:
        self._sums: dict[str, list[float]] = {key: [0.0, 0.0, 0.0] for key in keys if metric(key)}

    def add(self, key: str, value: float, count: float = 1.0) -> None:
        """Add a value, or the sum of ``count`` values. Raises KeyError for an unknown key."""
        within, row = metric(key).within, self._sums.setdefault(key, [0.0, 0.0, 0.0])
        if within == "max":
            row[0] = max(row[0], value)
        else:
            row[:] = row[0] + value, row[1] + count, row[2] + value * value

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Return every metric, combined over all ranks (a collective)."""
        keys = sorted({key for keys in ranks.gather(sorted(self._sums)) for key in keys})
        if not keys:
            return {}
        rows = [self._sums.get(key, [0.0, 0.0, 0.0]) for key in keys]
        sums = iter(ranks.sum([value for row in rows for value in row]))
        largest = ranks.max([row[0] for row in rows])
        found = {}
        for key, most in zip(keys, largest, strict=True):
            total, count, squares = next(sums), next(sums), next(sums)
            mean, within = total / max(1.0, count), metric(key).within
            if within == "std":
                found[key] = math.sqrt(max(0.0, squares / max(1.0, count) - mean**2))
            else:
                found[key] = {"mean": mean, "max": most}.get(within, total)
        return found


def combine(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of a step's updates. An update that lacks a key is ignored for that key."""
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values, across = [row[key] for row in rows if key in row], metric(key).across
        if across == "mean":
            found[key] = sum(values) / len(values)
        else:
            found[key] = {"sum": sum(values), "max": max(values), "last": values[-1]}[across]
    return found


def checked(row: Mapping[str, float]) -> dict[str, float]:
    """Return the row sorted by key. Raises KeyError for a key that is not in the table."""
    return {key: row[key] for key in sorted(row) if metric(key)}


def panels(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the report's panels for these keys, as title → key → the curve's label."""
    present = set(keys)
    found: dict[str, dict[str, str]] = {}
    for m in METRICS.values():
        title, _, label = m.panel.partition(": ")
        family, _, name = m.key.partition("{")
        named = {k: k.removeprefix(family) for k in sorted(present) if k.startswith(family)} if name else {}
        curves = {k: v for k, v in named.items() if k not in METRICS} or {m.key: label} if title else {}
        found.setdefault(title, {}).update({k: v for k, v in curves.items() if k in present})
    return {title: curves for title, curves in found.items() if curves}


def markdown() -> str:
    """Return the table as Markdown, for docs/metrics.md."""
    lines = [
        "| key | unit | within an update | across updates | meaning | TRL; verl |",
        "|---|---|---|---|---|---|",
    ]
    for m in METRICS.values():
        meaning = m.meaning.replace("|", "\\|")
        cells = (f"`{m.key}`", m.unit or "–", m.within, m.across, meaning, m.elsewhere or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Reported in every step with samples.
OF_GROUPS = (
    "reward", "reward_std", "reward_failures", "solved", "mixed_groups", "solved_groups", "unscored", "unreadable",
    "completions/mean_length", "completions/truncated",
)  # fmt: skip


def of_groups(meter: Meter, groups: Sequence[GatedGroup]) -> None:
    """Add the metrics of the policy's samples. ``reward`` and ``solved`` leave out unscored samples."""
    for group, view in [(g.group, g.view) for g in groups]:
        meter.add("mixed_groups", not view.is_degenerate)
        meter.add("solved_groups", any(view.own_solved))
        for rollout, score, solved in zip(group.rollouts, group.scores, view.solved, strict=True):
            if rollout.member is Origin.EXPERT:
                meter.add("demonstrations/correct", score.verdict is Verdict.CORRECT)
            if rollout.member is not Origin.POLICY:
                continue
            meter.add("unscored", score.reward is None)
            meter.add("unreadable", score.unreadable)
            meter.add("completions/mean_length", len(rollout.completion_ids))
            meter.add("completions/truncated", rollout.stop is Stop.LENGTH)
            data = group.prompt.data
            if score.reward is not None:
                for key in ("reward", "reward_std", *([f"data_reward/{data}"] if data else [])):
                    meter.add(key, score.reward)
            if solved is not None:
                for key in ("solved", *([f"data_solved/{data}"] if data else [])):
                    meter.add(key, solved)
            meter.add("reward_failures", score.failed)
            for name, value in score.parts.items():
                meter.add(f"reward/{name}", value)


def of_sets(names: Iterable[str]) -> dict[str, float]:
    """Return the number of rows of each data set of a step. Rows without a name are of the stage's only set."""
    return {f"data_rows/{name}": float(count) for name, count in Counter(names).items() if name}


def of_tokens(meter: Meter, context: Context, sets: Sequence[str] = ()) -> None:
    """Add the metrics of a micro-batch's trained tokens. The expert's tokens are measured separately. ``sets`` are
    the names of the data sets of all sequences, by their numbers in the step, if there are several."""
    for name in sorted({*sets} - {""}):
        numbers = [i for i, of in enumerate(sets) if of == name]
        index = context.batch.sequence_index
        mask = (index[:, None] == index.new_tensor(numbers)).any(dim=1)
        meter.add(f"data_nll/{name}", -float(context.policy_logprobs[mask].sum()), float(mask.sum()))
    batch, origin = context.batch, context.batch.origin
    expert, sampled = origin == int(Origin.EXPERT), origin == int(Origin.POLICY)
    for prefix, mask in (("", ~expert), ("expert/", expert)):
        count = float(mask.sum())
        meter.add(f"{prefix}entropy", float(context.entropy[mask].sum()), count)
        meter.add(f"{prefix}nll", -float(context.policy_logprobs[mask].sum()), count)
    meter.add("expert/share", float(expert.sum()), float(batch.num_targets))
    if count := float(sampled.sum()):
        log_ratio = (context.policy_logprobs - context.proximal_logprobs)[sampled]
        meter.add("approx_kl", float((log_ratio.exp() - 1 - log_ratio).sum()), count)
        if batch.behavior_logprobs is not None:
            # The proximal policy sampled these tokens, so this is the gap between engine and trainer.
            of_gap(meter, context.proximal_logprobs[sampled], batch.behavior_logprobs[sampled])


def of_gap(meter: Meter, trainer: Tensor, engine: Tensor) -> None:
    """Add the gap between the log-probabilities [K] of K > 0 sampled tokens, as trainer and engine have them."""
    gap, count = trainer - engine, float(trainer.numel())
    meter.add("sampling/logprob_difference_mean", float(gap.abs().sum()), count)
    meter.add("sampling/logprob_difference_max", float(gap.abs().max()))
    meter.add("sampling/kl", float((gap.exp() - 1 - gap).sum()), count)


def of_clipping(meter: Meter, coefficient: Tensor, advantage: Tensor, sampled: Tensor) -> None:
    """Add the share of clipped tokens. ``sampled`` are the tokens of a clipped surrogate; a token with an
    advantage but no gradient was clipped."""
    count, clipped = float(sampled.sum()), (coefficient == 0) & sampled
    meter.add("clip_ratio/low", float((clipped & (advantage < 0)).sum()), count)
    meter.add("clip_ratio/high", float((clipped & (advantage > 0)).sum()), count)


def of_correction(meter: Meter, weight: Tensor, sampled: Tensor) -> None:
    """Add the share of dropped tokens. ``weight`` is each token's correction (see ``mismatch_weight``)."""
    meter.add("correction/dropped", float(((weight == 0) & sampled).sum()), float(sampled.sum()))


def with_expert(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return an update's metrics, with separate keys for the expert if sampled tokens are also trained on."""
    found = {key: value for key, value in metrics.items() if not key.startswith("expert/")}
    expert = {key: value for key, value in metrics.items() if key.startswith("expert/")}
    share = expert.get("expert/share", 0.0)
    if share == 1:  # no token was sampled: all are the expert's
        return found | {k.removeprefix("expert/"): v for k, v in expert.items() if k != "expert/share"}
    return found | expert if share > 0 else found
