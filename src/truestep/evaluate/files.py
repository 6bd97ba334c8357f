"""The files of an evaluation: RUN/evaluations/GROUP/NAME.samples.jsonl and NAME.results.json. Its score is
in a row of RUN/summary.json. GROUP is a checkpoint of a run, or a prompt template of ``truestep eval``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from truestep.errors import UserError
from truestep.rundir import AGAIN, jsonl_lines, read_json, redact, write_json

SCHEMA_VERSION = 2  # version 1: rows had no lenient verdict, and strict was a second extraction
MAKE_AGAIN = "run the same command again with --resume, which makes what is missing"
Row = dict[str, Any]
# What is read again of a results file, with its type.
_RESULTS: dict[str, Any] = {"results": dict, "n-samples": dict, "samples_per_problem": int, "estimate": dict}


def samples_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.samples.jsonl"


def results_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.results.json"


def header_of(name: str, identity: str) -> Row:
    return {"header": True, "schema_version": SCHEMA_VERSION, "name": name, "identity": identity}


def sealed(row: Row, identity: str) -> Row:
    """Return the row as it is written, with a checksum of its content and of the evaluation's identity."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + identity
    return {**row, "checksum": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]}


def opened(row: Row, identity: str) -> Row | None:
    """Return a written row without its checksum, or None if it is not what was written. Older versions wrote no
    checksum. If its key is damaged, the value at the end still looks like one."""
    key, value = next(reversed(row.items()), ("", ""))
    if key != "checksum" and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)):
        return row if "verdict" in row else None
    plain = {k: v for k, v in row.items() if k != key}
    return plain if sealed(plain, identity) == row else None


def samples_in(path: Path) -> Iterator[tuple[int, Row | None]]:
    """Yield the line number and the sample of every line after the header, or None if the line is damaged."""
    identity = ""
    for number, row in jsonl_lines(path):
        if row is None:
            yield number, None
        elif row.get("header") and number == 1:
            identity = str(row.get("identity", ""))
        else:
            yield number, opened(row, identity)


def read_samples(path: Path) -> list[Row]:
    """Return the samples in a file, without its header. Raises UserError as ``checked_samples`` does, or if
    fewer samples are left than the results next to the file were computed from."""
    rows, made = list(checked_samples(path)), _results_beside(path)
    if made and len(rows) < (num := made["estimate"]["n"]):
        raise UserError(f"{path} has {len(rows)} samples, but {num} were made; {MAKE_AGAIN}")
    return rows


def _results_beside(path: Path) -> Row:
    results = results_file(path.parent, path.name.removesuffix(".samples.jsonl"))
    return read_results(results) if results.is_file() else {}


def checked_samples(path: Path) -> Iterator[Row]:
    """Yield the samples in a file one by one. Raises UserError if a line is damaged, a sample occurs twice, or
    the results next to the file are of other samples."""
    header = next((row or {} for _, row in jsonl_lines(path)), {})
    own = header.get("identity") if header.get("header") else None
    theirs = _results_beside(path).get("identity")
    if own != theirs and None not in (own, theirs):
        others = f"{path} has samples of identity {own}, but the results next to it are of {theirs}"
        raise UserError(f"{others}; {AGAIN}")
    seen = set[str]()
    for number, row in samples_in(path):
        if row is None:
            raise UserError(f"{path}:{number}: the sample is damaged; {MAKE_AGAIN}")
        key = json.dumps([row.get("problem_id"), row.get("sample_index")])
        if key in seen and "sample_index" in row:
            raise UserError(f"{path}:{number}: the sample {key} occurs twice; {MAKE_AGAIN}")
        seen.add(key)
        yield row


def read_results(path: Path) -> Row:
    """Return a results file's content. Raises UserError if it cannot be read or is not one."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; {AGAIN}")
    lacking = [key for key, kind in _RESULTS.items() if not isinstance(found.get(key), kind)]
    if lacking or not isinstance(found["estimate"].get("n"), int):
        raise UserError(f"{path} has no valid {(lacking or ['estimate.n'])[0]}; {AGAIN}")
    return found


def score_row(data: str, results: Mapping[str, Any], **group: str) -> Row:
    """Return a row of the summary; ``group`` is checkpoint=NAME or prompt=NAME."""
    metric = f"avg@{results['samples_per_problem']}"
    known = {"whole": True, "private": False, "published": {}, "metric": metric}
    facts = {key: results.get(key, default) for key, default in known.items()}
    rewards = {"rewards": results["rewards"]} if "rewards" in results else {}
    return {"data": data, **group, **facts, **results["estimate"], **rewards}


def read_score_row(row: Mapping[str, Any]) -> Row:
    """Return a row from a summary of any version. Version 1 calls the data set "benchmark"."""
    return {"data": row.get("benchmark", ""), **row}


def samples_of(run: Path, row: Mapping[str, Any]) -> Path:
    """Return the path of the samples behind a row of the summary."""
    return samples_file(run / "evaluations" / str(row.get("checkpoint") or row["prompt"]), str(row["data"]))


def end_summary(run: Path, status: str, error: BaseException | str = "") -> None:
    """Write into summary.json how a run ended that could not say so itself, if there is a summary. An error of
    these files is ignored, because the run ends with an error already, or is only read."""
    status = "interrupted" if isinstance(error, KeyboardInterrupt) else status
    with contextlib.suppress(OSError, UserError):
        if isinstance(summary := read_json(run / "summary.json"), dict):
            write_json(run / "summary.json", {**summary, "status": status, **ended(status, error)})


def ended(status: str, error: BaseException | str = "") -> dict[str, str]:
    """Return the error of a run that failed, as one line without secrets, as a summary has it."""
    text = str(error).partition("\n")[0] or type(error).__name__
    return {"error": redact(text)} if status == "failed" else {}
