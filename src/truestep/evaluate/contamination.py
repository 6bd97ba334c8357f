"""Which benchmark problems a training set already holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truestep.data.overlap import overlap_report
from truestep.data.problems import load_problems
from truestep.evaluate import benchmarks
from truestep.evaluate.sources import NotThere
from truestep.settings import DataSettings


def contamination(source: str, ids: Sequence[str], data: str) -> dict[str, Any]:
    """The overlap of a training set with each benchmark, by bare question: options and templates would hide
    equal ones.

    Without ``ids`` every benchmark whose file is in the folder ``data`` is looked at, and the others are
    listed as missing. Examples name ids only, so private benchmarks are safe here.
    """
    folder = Path(data) if data else None
    tested, missing = {}, []
    for id in ids or benchmarks.BY_ID:
        try:
            tested[id] = benchmarks.load(benchmarks.find(id), folder, bare=True)
        except NotThere:
            if ids:
                raise
            missing.append(id)
    settings = DataSettings.model_validate({"source": source})
    trained = {source: load_problems("train", settings, seed=0, base_dir=Path(), needs=())}
    return {**overlap_report(trained, tested), "missing": missing}
