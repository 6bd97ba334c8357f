"""Which weights a sampler has: every kind is named from either evidence, and every limit holds on both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from truestep.audit.environments.in_process import subject_module
from truestep.audit.measure import delivery, thresholds
from truestep.audit.measure.delivery import FAULTS, Candidate, DeliveryObservation, judge
from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.measure.observations import ObservationError
from truestep.audit.present.words import SENTENCES, found_in_words, nearest, row_of, sentence

KINDS = ("new", *FAULTS)
NOISE = 1e-3
PLACES, WORDS = 1500, 8
NEAR = Verdict.NOT_OBSERVABLE


def tables(seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """log π [K, N, V] of candidates that differ by about ``spread`` nats."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(1, PLACES, WORDS)) + spread * draw.normal(size=(len(KINDS), PLACES, WORDS))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def candidates(made: np.ndarray, tokens: np.ndarray) -> list[Candidate]:
    found = []
    for kind, one in zip(KINDS, made, strict=True):
        difference = one - made  # K, N, V
        mean = (np.exp(one) * difference).sum(-1)
        variance = (np.exp(one) * difference**2).sum(-1) - mean**2
        moments = np.stack([mean.sum(-1), variance.sum(-1)], 1)
        names = ("lm_head.weight",) if kind == "part" else ()
        found.append(Candidate(kind=kind, logps=one[np.arange(PLACES), tokens], moments=moments, names=names))
    return found


def observed(made: np.ndarray, sampler: np.ndarray, *, reports: bool, seed: int = 1) -> DeliveryObservation:
    """Samples of ``sampler`` [N, V], which reports log-probabilities with noise, or none."""
    draw = np.random.default_rng(seed)
    below = np.exp(sampler).cumsum(-1) < draw.uniform(size=(PLACES, 1))
    tokens = below.sum(-1).clip(max=WORDS - 1)
    found = candidates(made, tokens)
    if not reports:
        return DeliveryObservation(candidates=found)
    noise = NOISE * draw.normal(size=(2, PLACES))
    reported = sampler[np.arange(PLACES), tokens] + noise[0]
    return DeliveryObservation(candidates=found, reported=reported, rounded=found[0].logps + noise[1])


def judged(run: DeliveryObservation) -> Finding:
    return judge("sampler", {"arch": "llama"}, {"delivery": run})


@pytest.mark.parametrize("reports", [True, False], ids=["reported", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_the_sampler_are_named(kind: str, reports: bool) -> None:
    made = tables()
    for seed in range(1, 6):
        found = judged(observed(made, made[KINDS.index(kind)], reports=reports, seed=seed))
        if kind == "new":
            assert (found.verdict, found.codes, found.reasons) == (Verdict.RIGHT, (), ())
            continue
        code, said = FAULTS[kind]
        assert (found.verdict, found.codes) == (Verdict.FAULT, (code,))
        (main,) = found.found.data
        assert main.kinds == (said,)
        assert "others" not in main.values
    numbers = found.delivery["candidates"]
    assert [row["kind"] for row in numbers] == list(KINDS)
    assert nearest(found.delivery) == min(row["separation"] for row in numbers[1:])
    assert nearest(found.delivery) > 2 * found.delivery["limit"]


@pytest.mark.parametrize("reports", [True, False], ids=["reported", "tokens"])
def test_weights_that_no_candidate_has_are_a_fault_without_a_name(reports: bool) -> None:
    made, other = tables(), tables(seed=5)[0]
    found = judged(observed(made, other, reports=reports))
    assert (found.verdict, found.codes) == (Verdict.FAULT, ("other_weights",))
    (main,) = found.found.data
    assert main.values["distance"] == min(row["distance"] for row in found.delivery["candidates"])


def reported_at(distance: float, separations: dict[str, float]) -> DeliveryObservation:
    """New weights at this distance from the reported values, and candidates with these separations, on the other side."""
    new = np.linspace(-3.0, -0.1, 100)
    sign = np.where(np.arange(100) % 2, 1.0, -1.0)
    parts = [
        Candidate(
            kind=kind,
            logps=new - NOISE * s * sign,
            moments=np.zeros((0, 2)),
            names=("a.weight",) * (kind == "part"),
        )
        for kind, s in {"new": 0.0, **separations}.items()
    ]
    return DeliveryObservation(
        candidates=parts, reported=new + NOISE * distance * sign, rounded=new + NOISE * sign
    )


FAR = {"start": 1000.0}


def test_the_limit_of_reported_values_is_ten_times_the_noise() -> None:
    for distance, verdict in ((9.9, Verdict.RIGHT), (10.1, Verdict.FAULT)):
        assert judged(reported_at(distance, FAR)).verdict is verdict
    run = reported_at(1.0, FAR)
    assert run.noise == pytest.approx(NOISE)
    exact = replace(run, rounded=run.candidates[0].logps)  # the same precision: no measured noise
    assert exact.noise == thresholds.NOISE_FLOOR


def test_the_limit_of_tokens_is_five_standard_errors() -> None:
    one = Candidate(kind="new", logps=np.zeros(4), moments=np.array([[0.0, 0.0], [0.0, 4.0]]))
    for distance, verdict in ((4.9, Verdict.RIGHT), (5.1, Verdict.FAULT)):
        other = Candidate(
            kind="start", logps=np.full(4, -2 * distance / 4), moments=np.array([[400.0, 4.0], [0.0, 0.0]])
        )
        assert judged(DeliveryObservation(candidates=[one, other])).verdict is verdict


@pytest.mark.parametrize(("separation", "seen"), [(19.9, False), (20.1, True)])
def test_what_is_within_twice_the_limit_is_not_told_apart(separation: float, seen: bool) -> None:
    whole = judged(reported_at(0.0, {"start": separation, "part": 1000.0}))
    assert whole.verdict is (Verdict.RIGHT if seen else NEAR)
    assert [r.kinds for r in whole.reasons] == [] if seen else [("delivery_close",)]
    part = judged(reported_at(0.0, {"start": 1000.0, "part": separation}))
    assert part.verdict is Verdict.RIGHT
    assert [r.values["names"] for r in part.reasons] == [] if seen else [("a.weight",)]


def test_separations_of_tokens_count_both_directions() -> None:
    new = Candidate(kind="new", logps=np.zeros(4), moments=np.array([[0.0, 0.0], [15.0, 9.0]]))
    for back, verdict in ((1.0, Verdict.RIGHT), (-1.0, NEAR)):
        other = Candidate(
            kind="behind", logps=np.full(4, -3.75), moments=np.array([[10.0 + back, 4.0], [0.0, 0.0]])
        )
        assert judged(DeliveryObservation(candidates=[new, other])).verdict is verdict


def test_faults_that_fit_the_same_samples_are_named_together() -> None:
    for start, behind, said in ((-100.0, -101.0, ["start", "behind"]), (-101.0, -100.0, ["behind", "start"])):
        run = reported_at(100.0, {"start": start, "behind": behind, "first": -150.0})
        (main,) = judged(run).found.data
        named = [main, *main.values["others"]]
        assert [one.kinds for one in named] == [(f"delivery_{kind}",) for kind in said]


@pytest.mark.parametrize("place", ["reported", "rounded"])
def test_numbers_that_are_not_finite_are_a_fault(place: str) -> None:
    run = replace(reported_at(0.0, FAR), **{place: np.full(100, np.nan)})
    assert judged(run).codes == ("not_finite",)


def test_what_was_not_run_or_not_sampled_is_said() -> None:
    nothing = judged(DeliveryObservation(not_run="ImportError: ray"))
    assert (nothing.verdict, nothing.reasons[0].values["why"]) == (Verdict.NOT_RUN, "ImportError: ray")
    assert judged(DeliveryObservation()).verdict is NEAR
    assert judge("sampler", {}, {}).verdict is Verdict.NOT_RUN


def test_every_verdict_has_a_sentence() -> None:
    right = row_of(judged(reported_at(1.0, {"start": 900.0, "part": 3.0})))
    assert found_in_words(right) == (
        "100 sampled tokens have the probabilities of the new weights (1 times the noise; the nearest other weights that were "
        "told apart: 900); not observed: old values of a.weight would be within the noise"
    )
    assert nearest(judged(reported_at(0.0, {"start": 19.9})).delivery) == 0.0
    unknown = row_of(judged(reported_at(100.0, {"start": 1000.0})))
    assert "100 times the noise away (allowed: 10)" in found_in_words(unknown)
    near = row_of(judged(reported_at(100.0, {"start": -70.0})))
    assert f"if {SENTENCES['delivery_start']}" in found_in_words(near)
    close = judged(reported_at(0.0, {"start": 1.0})).reasons[0]
    assert sentence(close).endswith(f"if {SENTENCES['delivery_start']}")
    many = replace(
        delivery._fault(reported_at(0, {"part": 1.0}).candidates[1]), values={"names": tuple("abcde")}
    )
    assert "a, b, c and 2 more" in sentence(many)


def test_prompts_share_whole_blocks_and_differ_in_the_last_token() -> None:
    rows = [row["ids"] for row in delivery.build("delivery").rows]
    assert len({tuple(ids[:-1]) for ids in rows}) == 1
    assert len({ids[-1] for ids in rows}) == len(rows) > 1
    assert {len(ids) - 1 for ids in rows} == {delivery.SHARED}
    assert delivery.SHARED % 32 == 0
    assert min(map(min, rows)) >= delivery.FIRST_TOKEN
    assert max(map(max, rows)) < delivery.VOCABULARY < 50


Break = Callable[[dict[str, Any]], Any]
BREAKS: dict[str, Break] = {
    "kind": lambda d: d["candidates"][1].update(kind="other"),
    "length": lambda d: d["reported"].append(0.0),
    "shape": lambda d: d["candidates"][0].update(moments=[[0.0, 0.0]]),
    "key": lambda d: d.pop("versions"),
    "text": lambda d: d["candidates"][0].update(logps=["a", "b"]),
}


@pytest.mark.parametrize("broken", ["", *BREAKS, "file"])
def test_what_a_subject_wrote_is_checked(broken: str, tmp_path: Path) -> None:
    part = {"names": [], "logps": [-1.0, -2.0], "moments": [[0.0, 0.0], [1.0, 2.0]]}
    made: dict[str, Any] = {
        "candidates": [{**part, "kind": "new"}, {**part, "kind": "start"}], "reported": [-1.0, -2.0],
        "rounded": [-1.0, -2.0], "versions": {"torch": "2"}, "seconds": {"run": 1.0},
    }  # fmt: skip
    BREAKS.get(broken, lambda d: None)(made)
    if broken != "file":
        (tmp_path / "delivery.json").write_text(json.dumps(made))
    case = delivery.build("delivery")
    if broken:
        with pytest.raises(ObservationError):
            delivery.load(tmp_path, case)
        return
    found = delivery.load(tmp_path, case)
    assert [c.kind for c in found.candidates] == ["new", "start"]
    assert found.candidates[1].moments.tolist() == part["moments"]
    assert found.reported is not None
    assert found.reported.tolist() == [-1.0, -2.0]
    (tmp_path / "not-run.txt").write_text("why not")
    assert delivery.load(tmp_path, case).not_run == "why not"


def test_moments_are_those_of_all_tokens() -> None:
    made = tables(spread=0.5)[:3, :5]
    found = subject_module("delivery_recorder").moments(torch.tensor(made[1]), torch.tensor(made))
    for other, (mean, variance) in zip(made, found, strict=True):
        means, variances = 0.0, 0.0
        for own, logs in zip(made[1], other, strict=True):
            ratios, weights = own - logs, np.exp(own)
            means += np.average(ratios, weights=weights)
            variances += np.cov(ratios, aweights=weights, ddof=0)
        assert (mean, variance) == (pytest.approx(means), pytest.approx(variances))


@pytest.mark.parametrize("names", ["truestep", "peft"])
def test_adapters_are_merged_once(names: str) -> None:
    weight, first, second, other = (torch.randn(s) for s in ((4, 3), (2, 3), (4, 2), (5,)))
    state = {
        "model.q.weight": weight,
        "model.q.lora_A": first,
        "model.q.lora_B": second,
        "model.norm.weight": other,
    }
    if names == "peft":
        state = {
            "base_model.model.model.q.base_layer.weight": weight,
            "base_model.model.model.q.lora_A.default.weight": first,
            "base_model.model.model.q.lora_B.default.weight": second,
            "base_model.model.model.norm.weight": other,
        }
    found = subject_module("delivery_recorder").state_of(state, 3.0)
    added = 3.0 * second.double() @ first.double()
    assert set(found.whole) == {"model.q.weight", "model.norm.weight"}
    torch.testing.assert_close(found.added, {"model.q.weight": added})
    torch.testing.assert_close(found.whole["model.q.weight"], weight.double() + added)
