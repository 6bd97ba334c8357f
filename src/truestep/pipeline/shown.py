"""What a run prints about a stage: what is trained, a row of numbers for its steps, and what was exported.

A row fits into 80 columns, with the step and the time left, which the reporter adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from truestep.device import peak_memory_bytes
from truestep.progress import Measured, Note
from truestep.train.layout import compute_dtype
from truestep.train.loop import StageSpec
from truestep.train.policy import Policy

Metrics = Mapping[str, float]
Column = tuple[str, int, Callable[[Metrics, float], str]]  # heading, width, text from metrics and seconds


def _metric(heading: str, width: int, key: str, form: str) -> Column:
    return heading, width, lambda metrics, _: format(metrics[key], form) if key in metrics else "–"


_RATE = _metric("lr", 8, "learning_rate", ".1e")
_NORM = _metric("grad", 7, "grad_norm", ".3g")
_SPEED: Column = ("tok/s", 8, lambda metrics, seconds: f"{metrics['num_tokens'] / max(seconds, 1e-9):,.0f}")
_MEMORY: Column = ("memory", 9, lambda *_: f"{peak_memory_bytes() / 2**30:.1f} GiB")
_MEASURED = {
    "dev": _metric("dev", 6, "dev/score", ".3f"),
    "validation": _metric("val", 7, "validation/loss", ".4f"),
}
_OF_RL = (
    _metric("reward", 7, "reward", ".3f"), _metric("mixed", 6, "mixed_groups", ".2f"), _RATE, _NORM,
    _metric("length", 7, "completions/mean_length", ",.0f"), _SPEED, _MEMORY,
)  # fmt: skip
_OF_SFT = (_metric("loss", 8, "loss", ".4f"), _RATE, _NORM, _SPEED, _MEMORY)


def _columns(spec_kind: str, measured: Iterable[str]) -> tuple[Column, ...]:
    return (_OF_RL if spec_kind == "rl" else _OF_SFT) + tuple(_MEASURED[name] for name in measured)


def head(kind: str, measured: Iterable[str]) -> str:
    """Return the headings of the rows."""
    return " ".join(f"{heading:>{width}}" for heading, width, _ in _columns(kind, measured))


def row(kind: str, measured: Iterable[str], metrics: Metrics, seconds: float) -> Note:
    """Return a step's numbers. tok/s: trained tokens by the seconds of the whole step. memory: the largest so far."""
    line = " ".join(f"{text(metrics, seconds):>{width}}" for _, width, text in _columns(kind, measured))
    return Measured(line) if {"dev/score", "validation/loss"} & metrics.keys() else line


def stage_line(spec: StageSpec) -> str:
    """Say what the stage trains, with what, and on what."""
    policy: Policy = spec.policy
    parameters = list(policy.parameters())
    total = policy.shape.num_parameters
    trained = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
    share = "all trained" if trained == 1 else f"{100 * trained:.1f} % trained"
    ranks = f", {spec.ranks.world_size} ranks" if spec.ranks.world_size > 1 else ""
    kind = str(compute_dtype(policy, parameters[0])).removeprefix("torch.")
    return (
        f"{spec.name}: method {spec.updater.method.name}, {total:,} parameters ({share}), {kind} on "
        f"{parameters[0].device}{ranks}"
    )


def exported(spec: StageSpec, step: int, best: Mapping[str, Any]) -> tuple[int, str]:
    """Return the step whose weights are exported, and why. ``step`` is the last one."""
    if "loss" in best:
        return int(best["step"]), f"the lowest validation loss, {best['loss']:.4f}"
    if best:
        return int(best["step"]), f"the best dev score, {best['score']:.3f}"
    measured = ", ".join(f"{name}.select_best" for name in spec.settings.watched_data)
    return step, f"the last, because {measured} is off" if measured else "the last"


def weights(done: Mapping[str, Any]) -> str:
    """Say which weights a finished stage exported, for its model card ("" for a stage of an older version)."""
    if "exported" not in done:
        return ""
    planned = done.get("ended_early", {}).get("planned_steps")
    early = f" (ended early; {planned} were planned)" if planned else ""
    return f"step {done['exported']['step']} of {done['steps']}{early}, {done['exported']['why']}"
