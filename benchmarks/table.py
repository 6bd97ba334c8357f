"""Makes the tables of a benchmark: medians, ranges, and ratios to truestep within each repetition."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# section → (figure, unit, whether more is better)
FIGURES = {
    "sft": ("tokens_per_second", "real tokens/s", True),
    "rollout": ("tokens_per_second", "generated tokens/s", True),
    "rl": ("seconds_per_step", "s/step", False),
}
TITLES = {
    "sft": "SFT step",
    "rollout": "Rollout",
    "rl": "RL step",
    "matmul": "Share of the measured matmul rate",
}
OURS = "truestep"


def section_table(section: str, result: Mapping[str, Any]) -> str:
    title = (
        f"{TITLES[section]}: {result['dtype']}, {result['threads']} threads, {result['workload']}, "
        f"data {result['data']}"
    )
    body = _matmul(result) if section == "matmul" else _comparison(section, result)
    return f"{title}\n{body}"


def values(contestant: Mapping[str, Any], figure: str) -> list[float]:
    return [float(r["figures"][figure]) for r in contestant["repetitions"]]


def _comparison(section: str, result: Mapping[str, Any]) -> str:
    figure, unit, more_is_better = FIGURES[section]
    contestants = result["contestants"]
    ours = values(contestants[OURS], figure)
    our_memory = values(contestants[OURS], "peak_rss_bytes")
    rows = [["", unit, "range", "n", "truestep is", "peak GiB", "truestep needs", "load"]]
    failed = []
    for name, contestant in contestants.items():
        found = values(contestant, figure)
        if contestant["failed"]:
            failed.append(f"{name}: not run ({contestant['failed']})")
        if not found:
            continue
        memory = values(contestant, "peak_rss_bytes")
        faster = [a / b if more_is_better else b / a for a, b in zip(ours, found, strict=False)]
        smaller = [a / b for a, b in zip(our_memory, memory, strict=False)]
        rows.append(
            [
                name,
                f"{statistics.median(found):.4g}",
                f"{min(found):.4g} to {max(found):.4g}",
                str(len(found)),
                "" if name == OURS or not faster else f"{_spread(faster)} x as fast",
                f"{statistics.median(memory) / 2**30:.2f}",
                "" if name == OURS or not smaller else f"{statistics.median(smaller):.2f} x the memory",
                f"{max(r['load_average'] for r in contestant['repetitions']):.1f}",
            ]
        )
    return "\n".join([*_aligned(rows), *failed])


def _matmul(result: Mapping[str, Any]) -> str:
    """Return 6·N·tokens/s divided by the measured rate, and the work that was really done (the output layer
    processes only tokens that are trained on, and its logits are computed again in the backward pass)."""
    contestants = result["contestants"]
    rate = values(contestants["matmul rate"], "flops_per_second")
    lines = [f"{name}: not run ({c['failed']})" for name, c in contestants.items() if c["failed"]]
    if not rate:
        return "\n".join(lines)
    rows = [["", "tokens/s", "6·N·tokens/s", "share", "matmuls done", "share", "first step s", "steady s"]]
    rows.append(["matmul rate", "", f"{statistics.median(rate) / 1e9:.1f} GFLOP/s", "", "", "", "", ""])
    medians = {}
    for name, contestant in contestants.items():
        if name == "matmul rate" or not contestant["repetitions"]:
            continue
        speed = medians[name] = statistics.median(values(contestant, "tokens_per_second"))
        figures = contestant["repetitions"][0]["figures"]
        n, head = figures["num_parameters"], figures["num_head_parameters"]
        done = 6 * (n - head) + 8 * head * figures["trained_share"]
        steady = [r["figures"]["seconds_per_step"] for r in contestant["repetitions"]]
        first = [r["figures"]["step_seconds"][0] for r in contestant["repetitions"]]
        rows.append(
            [
                name,
                f"{speed:.4g}",
                f"{6 * n * speed / 1e9:.1f} GFLOP/s",
                f"{6 * n * speed / statistics.median(rate):.2f}",
                f"{done * speed / 1e9:.1f} GFLOP/s",
                f"{done * speed / statistics.median(rate):.2f}",
                ", ".join(f"{s:.1f}" for s in first),
                f"{statistics.median(steady):.2f}",
            ]
        )
    if {"truestep, eager", "truestep, compiled"} <= set(medians):
        eager, compiled = contestants["truestep, eager"], contestants["truestep, compiled"]
        ratios = [
            b / a
            for a, b in zip(
                values(eager, "tokens_per_second"), values(compiled, "tokens_per_second"), strict=False
            )
        ]
        extra = [
            r["figures"]["step_seconds"][0] - r["figures"]["seconds_per_step"]
            for r in compiled["repetitions"]
        ]
        lines.append(
            f"compiled is {_spread(ratios)} x as fast as eager; compiling took "
            + ", ".join(f"{s:.0f}" for s in extra)
            + " s (first repetition: empty cache)"
        )
    return "\n".join([*_aligned(rows), *lines])


def _spread(ratios: Sequence[float]) -> str:
    """Return the median of the paired ratios, with their range if there are several."""
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) < 2 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
