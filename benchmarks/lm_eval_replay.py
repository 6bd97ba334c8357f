"""Check that lm-evaluation-harness and truestep give the same score to recorded answers of other models.

    python benchmarks/lm_eval_replay.py LM_EVAL_PYTHON PAIRS.jsonl [--out FILE] [--show]

PAIRS contains rows with gold, pred (a whole answer), kind (response or choice), verdict (the label, 1 or 0)
and origin. Each row goes through one of lm-eval's own tasks, with a model that outputs the recorded answer:
gsm8k (strict-match, flexible-extract) if the gold answer comes from GSM8K, mmlu_pro if it is a letter, and
minerva_math (exact_match, math_verify) otherwise. LM_EVAL_PYTHON is the Python of an environment with
lm_eval[math] 0.4.13. Prints, for each task and metric, a JSON line that says how often lm-eval and truestep
agree, and which of them the label supports if they do not; ``--out`` also gets the ids.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from truestep.evaluate.pair_rows import read_pairs
from truestep.grade.pairs import grade_pairs

METRICS = {"gsm8k": ["strict-match", "flexible-extract"], "mmlu_pro_math": ["custom-extract"],
           "minerva_math_algebra": ["exact_match", "math_verify"]}  # fmt: skip


def task_of(row: dict[str, Any]) -> str:
    if row["kind"] == "choice":
        return "mmlu_pro_math"
    return "gsm8k" if "grade-school-math" in row["origin"] else "minerva_math_algebra"


def theirs(python: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return a mapping from row id to metric to the score and the extracted answer, for every metric of each
    row's task."""
    with tempfile.TemporaryDirectory() as folder:
        given = [{key: row[key] for key in ("id", "gold", "pred")} | {"task": task_of(row)} for row in rows]
        (Path(folder) / "rows.json").write_text(json.dumps(given))
        environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": folder + "/cache"}
        environment.pop("PYTHONPATH", None)
        words = [python, str(Path(__file__).with_name("lm_eval_replayed.py")), folder]
        subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
        found: dict[str, dict[str, dict[str, Any]]] = json.loads((Path(folder) / "found.json").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", action="store_true", help="print what each side extracted if they differ")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.pairs.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "response" or "model_outputs" in row["origin"]]
    chosen = {row["id"] for row in rows}
    pairs = [pair for pair in read_pairs(options.pairs) if pair.id in chosen]
    ours = {sample["id"]: sample for sample in grade_pairs(pairs)["samples"]}
    scored = theirs(options.python, rows)
    report = []
    for task, metrics in METRICS.items():
        members = [row for row in rows if task_of(row) == task]
        for metric in metrics:
            sides: Counter[str] = Counter()
            different = []
            for row in members:
                label, mine = bool(row["verdict"]), ours[row["id"]]["verdict"] == "correct"
                other = bool(scored[row["id"]][metric]["score"])
                side = (
                    "equal"
                    if mine == other
                    else "label with truestep"
                    if mine == label
                    else "label with lm-eval"
                )
                sides[side] += 1
                if mine != other:
                    different.append({"id": row["id"], "side": side})
                    if options.show:
                        print(
                            row["id"],
                            repr(ours[row["id"]]["extracted"]),
                            repr(scored[row["id"]][metric]["extracted"]),
                        )
            report.append(
                {"task": task, "metric": metric, "n": len(members), **sides, "different": different}
            )
    text = json.dumps({"results": report}, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n")
    for line in report:
        print(json.dumps({key: value for key, value in line.items() if key != "different"}))


if __name__ == "__main__":
    sys.exit(main())
