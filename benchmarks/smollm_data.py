"""Make the data folder for recipes/smollm2-gsm8k.toml from local copies of the public data sets.

    python benchmarks/smollm_data.py SOURCE [TARGET=data]

SOURCE contains gsm8k/train.jsonl (problem, answer, solution) and benchmarks/{mawps,asdiv,svamp,gsm8k}.jsonl
(problem, answer). Writes gsm8k-demonstrations.jsonl, gsm8k-test.jsonl and, for each word-problem set,
NAME-{train,dev,test}.jsonl. ASDiv and MAWPS share problems, and MAWPS has duplicates. Therefore a text that
has been seen in any set is dropped, and only the text decides the split, so that no problem is in two splits.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

SETS = ("svamp", "asdiv", "mawps")  # earlier sets keep a problem that a later one repeats
NUMBER = re.compile(r"-?\d+(\.\d+)?")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def split_of(text: str) -> str:
    bucket = int(hashlib.sha256(key(text).encode()).hexdigest(), 16) % 10
    return "test" if bucket < 2 else "dev" if bucket == 2 else "train"


def main() -> None:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "gsm8k" / "train.jsonl").is_file():
        raise SystemExit(
            "error: no SOURCE with gsm8k/train.jsonl; run python benchmarks/smollm_data.py SOURCE [TARGET]"
        )
    source, target = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "data")
    demonstrations = [
        {"id": row["id"], "problem": row["problem"], "answer": row["answer"],
         "solution": f"{row['solution'].strip()}\n#### {row['answer']}"}
        for row in read(source / "gsm8k" / "train.jsonl")
    ]  # fmt: skip
    write(target / "gsm8k-demonstrations.jsonl", demonstrations)
    write(target / "gsm8k-test.jsonl", [{k: row[k] for k in ("id", "problem", "answer")}
                                        for row in read(source / "benchmarks" / "gsm8k.jsonl")])  # fmt: skip
    seen = {key(row["problem"]) for row in demonstrations}
    for name in SETS:
        kept: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
        dropped: Counter[str] = Counter()
        for row in read(source / "benchmarks" / f"{name}.jsonl"):
            if not NUMBER.fullmatch(str(row["answer"]).strip()):
                dropped["answer is not a plain number"] += 1
            elif key(row["problem"]) in seen:
                dropped["repeated"] += 1
            else:
                seen.add(key(row["problem"]))
                kept[split_of(row["problem"])].append({k: str(row[k]) for k in ("id", "problem", "answer")})
        for split, rows in kept.items():
            write(target / f"{name}-{split}.jsonl", rows)
        print(f"{name}: dropped {dict(dropped)}")


if __name__ == "__main__":
    main()
