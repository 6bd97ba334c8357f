"""Computes a study's results from its cells: arms, contrasts, budgets, and what differs but should not.
The results are a pure function of the cells: the same cells always give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from truestep.study import analyse, cell_results
from truestep.study.plan import CONTROLS, Arm, Study, differences, owner_of, stage_tables

Cell = Mapping[str, Any]
Cells = Mapping[str, Cell]  # by name; also used for other data about each cell
# The kinds of a run's warnings, in the words of the table.
WORTHLESS = {
    "equal": "all rewards equal", "unmixed": "no group mixed", "cut": "every completion cut", "uniform": "loss above "
    "uniform", "collapsed": "entropy collapsed", "below": "reward below its start", "worse": "a stage made it worse",
}  # fmt: skip
CLOSE = 0.05  # budgets that differ by less count as the same


def results(
    study: Study, found: Cells, *, tuning: Cells, failures: Mapping[str, str], base: str = ""
) -> dict[str, Any]:
    """Compute everything for the report and the exports. ``found`` has the finished cells; a missing cell is
    never counted as 0."""
    by_arm = {arm.name: _cells_of(study, found.values(), arm) for arm in study.arms}
    arms = [_arm(study, arm, by_arm, tuning.get(arm.name, {})) for arm in study.arms]
    contrasts = [_contrast(by_arm, a, b, primary=True) for a, b in study.primary]
    # A contrast without a result yet (no cells, one seed) still belongs to the family.
    known = {(c["a"], c["b"]): c["all"] for c in contrasts}
    adjusted = analyse.holm({k: m["p_value"] if m and m["seeds_known"] else 1.0 for k, m in known.items()})
    contrasts += [_contrast(by_arm, a, b, primary=False) for a, b in study.secondary]
    for contrast in contrasts:
        if contrast["all"]:
            p = adjusted[contrast["a"], contrast["b"]] if contrast["primary"] else None
            contrast["p_adjusted"] = p
            contrast["verdict"] = analyse.verdict(analyse.Crossed(**contrast["all"]), p)
    return {
        "name": study.name, "question": study.question, "declaration": study.declaration,
        "seeds": list(study.seeds), "reference": study.reference, "base": base,
        "benchmarks": list(dict.fromkeys(name for cell in found.values() for name in cell["benchmarks"])),
        "arms": arms, "contrasts": contrasts,
        "controls_off": {c: study.controls_off[c] for c in CONTROLS if c in study.controls_off},
        **({"allow_overlap": dict(study.allow_overlap)} if study.allow_overlap else {}),
        "failures": dict(failures), "content": _content(found), "may_differ": list(study.may_differ),
        "complete": len(found) == sum(len(study.seeds_of(a)) for a in study.arms),
    }  # fmt: skip


def _cells_of(study: Study, cells: Iterable[Cell], arm: Arm) -> dict[int, Cell]:
    own = {cell["seed"]: cell for cell in cells if cell["arm"] == arm.name}
    return {seed: own[seed] for seed in study.seeds_of(arm) if seed in own}


def _tables(by_seed: Mapping[int, Cell], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the shares of correct samples [S, P] of each benchmark."""

    def share(cell: Cell, name: str) -> np.ndarray:
        return cell_results.counts(cell, name) / cell["benchmarks"][name]["samples"]

    names = list(next(iter(by_seed.values()))["benchmarks"]) if by_seed else []
    return {name: np.stack([share(by_seed[s], name) for s in seeds]) for name in names}


def _arm(
    study: Study, arm: Arm, by_arm: Mapping[str, Mapping[int, Cell]], tuning: Mapping[str, Any]
) -> dict[str, Any]:
    own, reference = by_arm[arm.name], by_arm[study.reference]
    seeds = list(own)
    tables = _tables(own, seeds)
    scores = {name: analyse.crossed([t], bounds=(0.0, 1.0)).to_json() for name, t in tables.items()}
    evaluated = [b for c in own.values() for b in c["benchmarks"].values()]
    row: dict[str, Any] = {
        "name": arm.name, "control": arm.control, "stages": list(arm.stages), "seeds": seeds,
        "scores": scores,
        "mean": analyse.crossed(list(tables.values()), bounds=(0.0, 1.0)).to_json() if tables else None,
        "flops_by_seed": {str(s): own[s]["flops"] for s in seeds},
        "by_seed": {str(s): {n: float(t[i].mean()) for n, t in tables.items()} for i, s in enumerate(seeds)},
        "sd_sample": _sample_sd(own, tables),
        "flops": {k: _mean(c["flops"][k] for c in own.values()) for k in ("paper", "full")},
        "tuning": dict(tuning), "path": _path(own),
        "unscored": sum(sum(b["unscored"].values()) for b in evaluated),
        "samples": sum(b["samples"] * b["num_problems"] for b in evaluated),
        **{k: _mean(b[k] for b in evaluated) for k in ("truncated", "mean_tokens")},
        "differs": {k: [repr(a), repr(b)] for k, (a, b) in differences(study, arm).items()},
        "data": _data(own),
        "checkpoint": _checkpoint(own),
    }  # fmt: skip
    return row | {"marks": _marks(study, row, own, reference, arm)}


def _checkpoint(own: Mapping[int, Cell]) -> str:
    """Return which weights of the last stage are evaluated, in the words of the table."""
    best = {measure for cell in own.values() for measure in cell["best"].get(cell["checkpoint"], {})}
    return "best on dev" if "score" in best else "lowest validation loss" if "loss" in best else "last"


def _mean(values: Any) -> float | None:
    listed = [float(v) for v in values]
    return sum(listed) / len(listed) if listed else None


def _sample_sd(own: Mapping[int, Cell], tables: Mapping[str, np.ndarray]) -> float | None:
    if not own:
        return None
    first = next(iter(own.values()))
    sizes = [first["benchmarks"][name]["samples"] for name in tables]
    return analyse.sample_sd([t * k for t, k in zip(tables.values(), sizes, strict=True)], sizes)


def _path(own: Mapping[int, Cell]) -> list[dict[str, Any]]:
    """Return the mean score of each checkpoint of the arm, at the mean FLOPs spent up to it."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in own.values():
        for point in cell["path"]:
            rows.setdefault((point["checkpoint"], point["data"]), []).append(point)
    means = ("score", "flops_paper", "flops_full")
    return [
        {"checkpoint": c, "data": d, **{k: _mean(p[k] for p in points) for k in means}}
        for (c, d), points in rows.items()
    ]


def _data(own: Mapping[int, Cell]) -> dict[str, Any]:
    """Count the tokens that the arm has seen, by data set and kind, as means over seeds."""
    seen: dict[str, list[float]] = {}
    for cell in own.values():
        for stage in cell["stages"]:
            for kind in ("demonstration_tokens", "rollout_tokens"):
                if tokens := stage["tokens"][kind]:
                    seen.setdefault(f"{stage['data']}: {kind.replace('_', ' ')}", []).append(tokens)
    return {key: sum(values) / len(own) for key, values in seen.items()}


def _marks(
    study: Study, row: Mapping[str, Any], own: Mapping[int, Cell], reference: Mapping[int, Cell], arm: Arm
) -> list[str]:
    """Say what differs between the arm and the reference, in the words of the table."""
    marks = []
    if len(own) < len(study.seeds_of(arm)):
        marks.append(f"{len(own)} of {len(study.seeds_of(arm))} seeds")
    if study.tuning and arm.stages and not row["tuning"].get("trials"):
        marks.append(f"untuned: {arm.untuned or 'no trial finished'}")
    if failed := row["tuning"].get("failed"):
        marks.append(f"rates whose trials failed: {', '.join(failed)}")
    tables = stage_tables(study, arm) if study.tuning else []
    if loose := [t["name"] for i, t in enumerate(tables[:-1]) if not owner_of(study, tables[: i + 1])]:
        marks.append(f"not tuned, because no arm ends with it: {', '.join(loose)}")
    mine, theirs = (
        {s["data"] for cell in cells.values() for s in cell["stages"]} for cells in (own, reference)
    )
    if extra := sorted(mine - theirs):
        marks.append(f"data that the reference does not see: {', '.join(extra)}")
    if lacking := sorted(theirs - mine) if arm.stages else []:
        marks.append(f"data that only the reference sees: {', '.join(lacking)}")
    goal, spent = _mean(c["flops"]["paper"] for c in reference.values()), row["flops"]["paper"]
    compared = goal and arm.stages and arm.name != study.reference
    ratio = spent / goal if compared and spent is not None else 1.0
    if abs(ratio - 1) > CLOSE:
        marks.append(f"budget {ratio:.2f}x")
    warned = [
        kind
        for cell in own.values()
        for kind in {w["kind"] for w in cell.get("warnings", []) if "until" not in w}
    ]
    for kind in sorted(set(warned)):
        marks.append(f"{WORTHLESS.get(kind, kind)} in {warned.count(kind)} of {len(own)} seeds")
    if row["unscored"]:
        marks.append(f"{row['unscored']} of {row['samples']} samples are unscored and count as incorrect")
    return marks


def _content(found: Mapping[str, Cell]) -> dict[str, list[str]]:
    """Return the hashes of base model and data sets over all cells. Several hashes mean that cells differ."""
    seen: dict[str, set[str]] = {}
    for cell in found.values():
        for name, value in cell["content"].items():
            seen.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in sorted(seen.items())}


def _contrast(by_arm: Mapping[str, Mapping[int, Cell]], a: str, b: str, *, primary: bool) -> dict[str, Any]:
    """Compute a − b on the seeds and problems that both have, for each benchmark and on average."""
    seeds = [s for s in by_arm[a] if s in by_arm[b]]
    found: dict[str, Any] = {"a": a, "b": b, "primary": primary, "seeds": seeds, "all": None, "benchmarks": {},
                             "by_seed": {}, "verdict": "no seed is finished in both arms", "p_adjusted": None}  # fmt: skip
    if not seeds:
        return found
    first, second = _tables(by_arm[a], seeds), _tables(by_arm[b], seeds)
    differs = {}
    for name in first:
        ids = {by_arm[arm][s]["benchmarks"][name]["problems"] for arm in (a, b) for s in seeds}
        if name not in second or len(ids) != 1:
            found["verdict"] = f"the problems of {name} are not the same"
            return found
        differs[name] = first[name] - second[name]
    tables = list(differs.values())
    found["all"] = analyse.crossed(tables).to_json()
    found["benchmarks"] = {name: analyse.crossed([t]).to_json() for name, t in differs.items()}
    means = sum(t.mean(1) for t in tables) / len(tables)
    found["by_seed"] = {str(s): float(m) for s, m in zip(seeds, means, strict=True)}
    return found
