"""The files of an evaluation: RUN/evaluations/GROUP/NAME.samples.jsonl and NAME.results.json. Its score is
in a row of RUN/summary.json. GROUP is a checkpoint of a run, or a prompt template of ``truestep eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truestep.rundir import read_jsonl

SCHEMA_VERSION = 2  # version 1: rows had no lenient verdict, and strict was a second extraction
Row = dict[str, Any]


def samples_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.samples.jsonl"


def results_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.results.json"


def read_samples(path: Path) -> list[Row]:
    """Return the samples in a file, without its header."""
    return [row for row in read_jsonl(path) if "verdict" in row]


def score_row(data: str, results: Mapping[str, Any], **group: str) -> Row:
    """Return a row of the summary; ``group`` is checkpoint=NAME or prompt=NAME."""
    metric = f"avg@{results['samples_per_problem']}"
    known = {"whole": True, "private": False, "published": {}, "metric": metric}
    facts = {key: results.get(key, default) for key, default in known.items()}
    return {"data": data, **group, **facts, **results["estimate"]}


def read_score_row(row: Mapping[str, Any]) -> Row:
    """Return a row from a summary of any version. Version 1 calls the data set "benchmark"."""
    return {"data": row.get("benchmark", ""), **row}


def samples_of(run: Path, row: Mapping[str, Any]) -> Path:
    """Return the path of the samples behind a row of the summary."""
    return samples_file(run / "evaluations" / str(row.get("checkpoint") or row["prompt"]), str(row["data"]))
