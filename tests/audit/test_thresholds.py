"""Every limit of ``measure.thresholds`` from both sides, and thirty times larger and smaller ones are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from truestep.audit.measure import thresholds
from truestep.audit.measure.cases import Case, Row
from truestep.audit.measure.findings import Verdict
from truestep.audit.measure.observations import MicroBatch, Observation, Step
from truestep.audit.measure.one_case import clip, clip_of_parts, resume, schedule
from truestep.audit.measure.one_step import _clipped_entries, _frozen, _rounded, reaches_clip, see
from truestep.audit.measure.patterns import fit_pattern
from truestep.audit.measure.verdict import _unusable, judge, loss_shows_it
from truestep.audit.measure.weights import Recovered, adamw_changes, noise_of

SIZE, COUNTS = 400, (2, 27, 3, 17)
DRAW = np.random.default_rng(0)
GRADIENTS = DRAW.normal(size=(len(COUNTS), SIZE)) * np.array(COUNTS)[:, None]
ELSEWHERE = DRAW.normal(size=SIZE)  # in the span of no gradient
ELSEWHERE -= GRADIENTS.T @ np.linalg.lstsq(GRADIENTS.T, ELSEWHERE, rcond=None)[0]
RIGHT = GRADIENTS.sum(0) / sum(COUNTS)
ELSEWHERE *= np.linalg.norm(RIGHT) / np.linalg.norm(ELSEWHERE)


def step(direction: np.ndarray = RIGHT, *, noise: float = 0.0, before: Any = 0.0, **more: Any) -> Step:
    """One step of rate 1 against ``direction``, over one row in each of four micro-batches."""
    batches = tuple(
        MicroBatch(
            rank=0, index=i, lines=((i,),), row_counts=(n,), row_gradients=(g,), loss_sum=float(n), size=SIZE
        )
        for i, (n, g) in enumerate(zip(COUNTS, GRADIENTS, strict=True))
    )
    start = np.zeros(SIZE) + before
    control = (RIGHT + noise * ELSEWHERE) * sum(COUNTS)
    values: dict[str, Any] = {"microbatches": batches, "control": control, "extras": {}, **more}
    return Step(before=start, after=start - direction, learning_rate=1.0, **values)


def run(*steps: Step, **asked: Any) -> Observation:
    row = Row(ids=(3, 4), trained=(0, 1))
    case = Case(name="made up", rows=(row,) * len(COUNTS), **{"steps": len(steps), **asked})
    return Observation(asked=case, steps=steps)


def recovered(weights: Any, error: float = 1e-9) -> Recovered:
    values = np.array(weights, dtype=float)
    return Recovered(
        weights=values, errors=np.full(len(values), error), residual=0.0, condition=1.0, relative_error=1.0,
        noise=1e-9, counts=(COUNTS,), empty=(),
    )  # fmt: skip


def residual(dtype: str, noise: float) -> Callable[[float], bool]:
    return lambda size: bool(see(step(RIGHT + size * ELSEWHERE, noise=noise), None, dtype).causes)


def weight(dtype: str) -> Callable[[float], bool]:
    """Of the longest micro-batch."""
    return lambda size: bool(see(step(RIGHT + size * GRADIENTS[1] / sum(COUNTS)), None, dtype).causes)


def weight_of_cast_losses(size: float) -> bool:
    """Of the longest micro-batch: it changes the whole step by ``size``."""
    off = size * np.linalg.norm(RIGHT) / np.linalg.norm(GRADIENTS[1]) * GRADIENTS[1]
    return bool(see(step(RIGHT + off, noise=0.1, narrow="bfloat16"), None, "float32").causes)


def weight_within_errors(size: float) -> bool:
    found = fit_pattern(recovered([1, 1, 1, 1 + 0.1 * size], error=0.1), "float64")
    return found is None or bool(found.causes)


def known_factor(size: float) -> bool:
    found = fit_pattern(recovered(4 * (1 + size) * np.ones(4)), "float32")
    assert found is not None
    return found.causes[0].code == "scale"


def lengths(size: float) -> bool:
    """Two steps whose right gradients differ much were clipped to one length."""
    short = replace(step(), microbatches=step().microbatches[:1])
    used = short.expected / np.linalg.norm(short.expected)
    pair = run(replace(short, after=-used), step((1 + size) * RIGHT / np.linalg.norm(RIGHT)))
    return clip(pair, [0, 1]) is None


def at_the_clip(size: float) -> bool:
    return not reaches_clip(step((1 + size) * RIGHT, max_grad_norm=float(np.linalg.norm(RIGHT))))


def rates(size: float) -> bool:
    return schedule(run(*[step()] * 4, decay=True), [1.0, 1.0 + size / 0.75, 1.0, 1.0]) is not None


def rate_after_resume(size: float) -> bool:
    found = resume(
        run(
            step(ELSEWHERE), step((1 + size) * RIGHT, before=-ELSEWHERE), resume_after=1, decay=True, steps=4
        ),
        1e-3,
    )
    return found is not None


def clipped_parts(size: float) -> bool:
    limit = 0.5 * float(np.linalg.norm(RIGHT))
    parts = [g / sum(COUNTS) for g in GRADIENTS]
    short = np.sum([p * min(1.0, limit / np.linalg.norm(p)) for p in parts], axis=0)
    aside = ELSEWHERE * np.linalg.norm(short) / np.linalg.norm(ELSEWHERE)
    return clip_of_parts(step(short + size * aside, max_grad_norm=limit), 4) is None


def parallel(condition: float) -> bool:
    """Two unit vectors at an angle: the condition of a pair is the cotangent of half of it."""
    angle = 2 * math.atan(1 / condition)
    along, across = GRADIENTS[0] / np.linalg.norm(GRADIENTS[0]), ELSEWHERE / np.linalg.norm(ELSEWHERE)
    pair = (along, math.cos(angle) * along + math.sin(angle) * across)
    batches = tuple(
        replace(m, row_gradients=(g,)) for m, g in zip(step().microbatches[:2], pair, strict=True)
    )
    made = run(replace(step(), microbatches=batches), accumulation=2)
    whole = replace(made, asked=replace(made.asked, rows=made.asked.rows[:2]))
    return [c.kinds for c in _unusable(whole, True)] == [("ill_conditioned",)]


def adamw_update(size: float) -> bool:
    (change,) = adamw_changes([step()], "right") or []
    off = ELSEWHERE * np.linalg.norm(change) / np.linalg.norm(ELSEWHERE)
    moved = replace(step(), after=change + size * off)
    exact = float(np.linalg.norm(moved.after - change) / np.linalg.norm(moved.after))
    assert exact == pytest.approx(size, rel=0.1)
    return judge("made up", {"optimizer": "adamw"}, {"ragged": run(moved)}).verdict is Verdict.FAULT


def restored(size: float) -> bool:
    second = step(before=-RIGHT + size)
    found = resume(run(step(), second, resume_after=1), 1e-3)
    return found is not None and found.kinds == ("resume_parameters",)


def ranks(size: float) -> bool:
    return bool(_unusable(replace(run(step()), ranks_differ=size), True))


def logged_loss(size: float) -> bool:
    return bool(loss_shows_it(step(logged_loss=1.0 + size)))


def explained(factor: float) -> bool:
    """What an added column leaves of the residual."""
    column = np.random.default_rng(1).normal(size=SIZE)
    column -= GRADIENTS.T @ np.linalg.lstsq(GRADIENTS.T, column, rcond=None)[0]
    column -= ELSEWHERE * (column @ ELSEWHERE) / (ELSEWHERE @ ELSEWHERE)
    column *= np.linalg.norm(RIGHT) / np.linalg.norm(column)
    rest = 0.3 / math.sqrt(factor**2 - 1)
    taken = step(RIGHT + 0.3 * column + rest * ELSEWHERE, extras={"prompt": column * sum(COUNTS)})
    return see(taken, None, "float32").codes == ("prompt_trained",)


def entries_at_the_largest(share: float) -> bool:
    largest = 2 * np.abs(RIGHT).max()
    return _clipped_entries(step(np.where(np.arange(SIZE) < round(share * SIZE), largest, RIGHT))) is not None


def tensor_that_does_not_move(share: float) -> bool:
    """Its part of the gradient's norm."""
    gradients = [g * np.where(np.arange(SIZE) < 40, 1.0, 1e-9) for g in GRADIENTS]
    part = sum(gradients) / sum(COUNTS)
    scale = share * np.linalg.norm(RIGHT[40:]) / np.linalg.norm(part[:40])
    batches = tuple(
        replace(m, row_gradients=(np.where(np.arange(SIZE) < 40, scale * g, g),))
        for m, g in zip(step().microbatches, GRADIENTS, strict=True)
    )
    taken = replace(step(np.where(np.arange(SIZE) < 40, 0.0, RIGHT)), microbatches=batches)
    return _frozen(taken, [("first", (40,)), ("rest", (SIZE - 40,))]) is not None


def lost(*groups: tuple[int, float, bool]) -> bool:
    """Whether lost updates are named: (how many parameters, size of their update, whether it is lost)."""
    wanted = np.concatenate([np.full(n, size) for n, size, _ in groups])
    gone = np.concatenate([np.full(n, is_lost) for n, _, is_lost in groups])
    count = len(wanted)
    batch = MicroBatch(
        rank=0, index=0, lines=((0,),), row_counts=(1,), row_gradients=(wanted,), loss_sum=1.0, size=count
    )
    start = np.full(count, 1.001)
    taken = Step(
        before=start, after=start - np.where(gone, 0.0, wanted) - 0.0, learning_rate=1.0, microbatches=(batch,),
        control=wanted, extras={},
    )  # fmt: skip
    return _rounded(taken) is not None


LARGE, SMALL = 0.1003, 1e-4  # relative updates


@dataclass(frozen=True)
class Limit:
    """``decides`` is False below the limit and True above it, or the other way round if ``falls``."""

    name: str
    decides: Callable[[float], bool]
    key: str = ""  # of a limit that has one value for each precision
    sides: tuple[float, float] = (0.7, 1.4)  # times the limit
    falls: bool = False
    only_larger: bool = False  # a smaller one changes nothing: another limit holds there


LIMITS = [
    Limit("NOISE_FLOOR", lambda size: math.isclose(noise_of(step(noise=size), "float64"), size)),
    Limit("NOISE_FACTOR", lambda factor: residual("float32", 1e-3)(1e-3 * factor)),
    Limit("RESIDUAL", residual("float32", 0.0), "float32"),
    Limit("RESIDUAL", residual("bfloat16", 0.0), "bfloat16"),
    Limit("RESIDUAL", residual("float64", 0.0), "float64", sides=(0.7, 14), only_larger=True),
    Limit("WEIGHT", weight("float32"), "float32"),
    Limit("WEIGHT", weight("bfloat16"), "bfloat16"),
    Limit("WEIGHT", weight("float64"), "float64", sides=(0.7, 14), only_larger=True),
    Limit("CAST", weight_of_cast_losses),
    Limit("STANDARD_ERRORS", weight_within_errors),
    Limit("KNOWN_FACTOR", known_factor),
    Limit("CLOSE", lengths),
    Limit("CLOSE", at_the_clip),
    Limit("CLOSE", rates),
    Limit("CLOSE", rate_after_resume),
    Limit("FIT_OF_CLIPPED_PARTS", clipped_parts),
    Limit("ILL_CONDITIONED", parallel),
    Limit("ADAMW_ERROR", adamw_update),
    Limit("RANKS_EQUAL", ranks),
    Limit("RESTORED", restored),
    Limit("LOSS", logged_loss),
    Limit("EXPLAINED", explained),
    Limit("CLIPPED_SHARE", entries_at_the_largest),
    Limit("UNMOVED", tensor_that_does_not_move),
    Limit("SMALL_UPDATE", lambda size: lost((500, size, True), (500, size, False)), falls=True),
    Limit("VISIBLE_UPDATE", lambda size: lost((500, size, True), (500, LARGE, False))),
    Limit(
        "LOST_UPDATES",
        lambda share: lost(
            (round(1e4 * share), SMALL, True),
            (round(1e4 * share), SMALL, False),
            (round(1e4 - 2e4 * share), LARGE, False),
        ),
    ),
    Limit(
        "LOST_ARE_SMALL",
        lambda share: lost((round(1000 * share), SMALL, True), (round(1000 - 1000 * share), LARGE, True)),
        sides=(0.95, 1.03),
    ),
    Limit(
        "SMALL_ARE_LOST",
        lambda share: lost((round(1000 * share), SMALL, True), (round(1000 - 1000 * share), SMALL, False)),
    ),
]


# The values that were found to tell right steps from wrong ones: written here, so that another one is seen.
FOUND: dict[str, float | dict[str, float]] = {
    "NOISE_FLOOR": 1e-6,
    "NOISE_FACTOR": 10,
    "RESIDUAL": {"float64": 1e-6, "float32": 1e-4, "bfloat16": 1e-4},
    "WEIGHT": {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.02},
    "CAST": 0.2,
    "STANDARD_ERRORS": 5,
    "KNOWN_FACTOR": 2e-3,
    "CLOSE": 1e-2,
    "FIT_OF_CLIPPED_PARTS": 5e-3,
    "ILL_CONDITIONED": 1e3,
    "ADAMW_ERROR": 1e-2,
    "RANKS_EQUAL": 1e-6,
    "RESTORED": 1e-6,
    "LOSS": 2e-2,
    "EXPLAINED": 20,
    "CLIPPED_SHARE": 1e-2,
    "UNMOVED": 1e-3,
    "SMALL_UPDATE": 2**-7,
    "VISIBLE_UPDATE": 2**-20,
    "LOST_UPDATES": 1e-2,
    "LOST_ARE_SMALL": 0.95,
    "SMALL_ARE_LOST": 0.3,
}


def value(limit: Limit) -> float:
    found = FOUND[limit.name]
    return found[limit.key] if isinstance(found, dict) else found


def times(limit: Limit, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(thresholds, limit.name)
    changed = {**found, limit.key: factor * found[limit.key]} if limit.key else factor * found
    monkeypatch.setattr(thresholds, limit.name, changed)


named = pytest.mark.parametrize("limit", LIMITS, ids=lambda m: f"{m.name} {m.key or m.decides.__name__}")


@named
def test_a_limit_decides_on_both_of_its_sides(limit: Limit) -> None:
    below, above = (side * value(limit) for side in limit.sides)
    assert limit.decides(below) is limit.falls
    assert limit.decides(above) is not limit.falls


@named
def test_another_limit_would_be_seen(limit: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    below, above = (side * value(limit) for side in limit.sides)
    times(limit, 30, monkeypatch)
    assert limit.decides(above) is limit.falls
    if not limit.only_larger:
        times(limit, 1 / 900, monkeypatch)
        assert limit.decides(below) is not limit.falls


def test_every_limit_is_tried() -> None:
    found = {name for name in vars(thresholds) if name.isupper()}
    assert {limit.name for limit in LIMITS} == found == FOUND.keys()
    for name in found:
        if isinstance(getattr(thresholds, name), dict):
            assert {limit.key for limit in LIMITS if limit.name == name} == set(getattr(thresholds, name))


def test_the_recorder_asks_for_no_other_cause_if_rows_explain_a_step() -> None:
    torch = pytest.importorskip("torch")
    from truestep.audit.measure import recorder

    spec = SimpleNamespace(options={}, is_relation=False, world_size=1)
    watcher = SimpleNamespace(spec=spec)
    rows = [torch.tensor(g) for g in GRADIENTS]
    for size, seen in ((0.7, True), (1.4, False)):
        change = torch.tensor(RIGHT + size * recorder.EXPLAINED * ELSEWHERE)
        assert recorder.Recorder._explained(watcher, change, rows, range(len(rows))) is seen


def kind_of_clip(lengths: tuple[float, float], configured: float) -> tuple[str, ...]:
    """Of two steps with very different right gradients, used at these lengths; 0 is "as long as it should be"."""
    short = replace(step(), microbatches=step().microbatches[:1])
    pairs = zip((short.expected, RIGHT), lengths, strict=True)
    first, second = (
        wanted * (length / np.linalg.norm(wanted) if length else 1.0) for wanted, length in pairs
    )
    found = clip(run(replace(short, after=-first), step(second), max_grad_norm=configured), [0, 1])
    return found.kinds if found else ()


def test_a_clip_is_told_from_none_and_from_another() -> None:
    assert kind_of_clip((0, 0), 0.1) == ("clip_missing",)
    assert kind_of_clip((0, 0), 0.0) == ()
    assert kind_of_clip((0.5, 0.5), 0.1) == ("clip_to_other",)
    assert kind_of_clip((0.5, 0.5), 0.0) == ("clip_to",)
    assert kind_of_clip((0.5, 0.7), 0.0) == ()
