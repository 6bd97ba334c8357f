"""The part of lm_eval_replay.py that runs in lm-eval's environment: it reads FOLDER/rows.json and writes
FOLDER/found.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS = Path(lm_eval.__file__).parent / "tasks"
FILES = {"gsm8k": "gsm8k/gsm8k.yaml", "mmlu_pro_math": "mmlu_pro/mmlu_pro_math.yaml",
         "minerva_math_algebra": "minerva_math/minerva_math_algebra.yaml"}  # fmt: skip
OVERLAY = """include: {file}
task: replay_{task}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}, train: {data}, validation: {data}}}}}
num_fewshot: 0
"""


class Recorded(LM):
    """A model that answers the prompt of a row with the row's recorded answer, cut at the task's stops."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in requests:
            text = self.answers[str(request.doc["id"])]
            for stop in request.args[1]["until"]:
                text = text.split(stop)[0]
            found.append(text)
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


def document(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row as a document, with the fields that its task reads."""
    gold = row["gold"]
    by_task = {
        "gsm8k": {"question": row["id"], "answer": f"#### {gold}"},
        "mmlu_pro_math": {"question": row["id"], "options": [*"ABCDEFGHIJ"], "answer": gold, "category": "math",
                          "cot_content": ""},
        "minerva_math_algebra": {"problem": row["id"], "solution": f"\\boxed{{{gold}}}"},
    }  # fmt: skip
    return {"id": row["id"], **by_task[row["task"]]}


def main(folder: Path) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    found: dict[str, dict[str, Any]] = {row["id"]: {} for row in rows}
    for task in FILES:
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(document(row)) + "\n" for row in rows if row["task"] == task))
        (folder / f"replay_{task}.yaml").write_text(
            OVERLAY.format(file=TASKS / FILES[task], task=task, data=data)
        )
    model = Recorded({row["id"]: row["pred"] for row in rows})
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"replay_{task}" for task in FILES],
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )
    for samples in results["samples"].values():
        for sample in samples:
            name, extracted = sample["filter"], sample["filtered_resps"][0]
            metrics = (
                {name: "exact_match"} if name != "none" else {m: m for m in ("exact_match", "math_verify")}
            )
            for metric, key in metrics.items():
                found[sample["doc"]["id"]][metric] = {"score": sample[key], "extracted": extracted[-80:]}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
