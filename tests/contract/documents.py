"""Make every kind of document that the commands write or print, and describe its fields.

python tests/contract/documents.py          write documents.json and examples.json again, after a field was changed on
                                            purpose; then run benchmarks/reference.py
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny_runs import EVALUATION, write_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "guard"))
import logs as guarded

RECORDED = Path(__file__).with_name("documents.json")
EXAMPLES = Path(__file__).with_name("examples.json")
PAIRS = '{"gold": "1/2", "pred": "\\\\boxed{0.5}"}\n{"gold": "C", "pred": "(C)", "kind": "choice"}\n'
PRINTED = {
    "run --dry-run": ("run", "recipe/run.toml", "--dry-run", "--json"),
    "eval --dry-run": ("eval", "eval.toml", "--dry-run", "--json"),
    "eval": ("eval", "eval.toml", "--out", "evaluated", "--json"),
    "eval compare": ("eval", "compare", "run/evaluations/sft", "run/evaluations/rl", "--json"),
    "eval export": ("eval", "export", "run", "--out", "exported", "--json"),
    "eval import": ("eval", "import", "exported/rl", "--out", "imported", "--json"),
    "eval grade": ("eval", "grade", "pairs.jsonl", "--json"),
    "eval list": ("eval", "list", "--json"),
    "data convert": (
        "data",
        "convert",
        "recipe/train.jsonl",
        "--to",
        "trl",
        "--out",
        "c.jsonl",
        "--dry-run",
        "--json",
    ),
    "data check": ("data", "check", "recipe/train.jsonl", "--json"),
    "data show": ("data", "show", "recipe/run.toml", "--json"),
    "method list": ("method", "list", "--json"),
    "guard": ("guard", "guarded/log.jsonl", "--json"),
}


def shape(value: Any) -> Any:
    """Return the fields of a JSON value with their types. Elements of a list are described together."""
    if isinstance(value, dict):
        if len(value) > 40 or (
            len(value) > 1 and all(re.fullmatch(r"[0-9a-f]{8,}|\d+|(\w+/)?model\.\S+", key) for key in value)
        ):
            return {"*": joined([shape(v) for v in value.values()])}
        return {key: shape(v) for key, v in sorted(value.items())}
    if isinstance(value, list):
        return [joined([shape(v) for v in value])] if value else []
    return {bool: "bool", int: "number", float: "number", str: "text", type(None): "null"}[type(value)]


def joined(shapes: list[Any]) -> Any:
    """Return one description for values of the same kind; a field that some of them lack has a "?"."""
    kinds = list({json.dumps(s, sort_keys=True): s for s in shapes}.values())
    if len(kinds) > 1 and all(isinstance(s, dict) for s in kinds):
        keys = sorted({key for s in kinds for key in s})
        return {
            key if all(key in s for s in kinds) else f"{key}?": joined([s[key] for s in kinds if key in s])
            for key in keys
        }
    if len(kinds) > 1 and all(isinstance(s, list) for s in kinds):
        parts = [part for s in kinds for part in s]
        return [joined(parts)] if parts else []
    return kinds[0] if len(kinds) == 1 else sorted(map(str, kinds))


def printed(*words: str) -> str:
    from truestep.cli.main import main

    out, said, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["truestep", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    assert not code, f"{' '.join(words)}: exit code {code}: {said.getvalue()[-500:]}"
    return out.getvalue()


def described(folder: Path) -> dict[str, Any]:
    """Run the commands in an empty folder, which must be the current one; return the shape of every document."""
    write_recipe(folder / "recipe")
    (folder / "eval.toml").write_text(EVALUATION.format(model="run/stages/02-rl/export"))
    (folder / "pairs.jsonl").write_text(PAIRS)
    printed("run", "recipe/run.toml", "--out", "run")
    guarded.train(folder / "guarded" / "log.jsonl")
    found = {f"truestep {name}": shape(json.loads(printed(*words))) for name, words in PRINTED.items()}
    for path in sorted(
        p
        for top in ("run", "evaluated", "exported", "imported", "guarded")
        for p in (folder / top).rglob("*.json*")
    ):
        name = re.sub(r"step_\d+", "step_N", str(path.relative_to(folder)))
        if "/export/" in name and path.name != "truestep_export.json":
            continue  # written by transformers
        rows = (
            [json.loads(line) for line in path.read_text().splitlines()]
            if path.suffix == ".jsonl"
            else [json.loads(path.read_text())]
        )
        found[name] = joined([shape(row) for row in rows])
    return found


def examples(folder: Path) -> dict[str, list[Any]]:
    """Return the first row of every file of the run that ``described`` has made, and the first two of samples."""
    found = {}
    for path in sorted((folder / "run").rglob("*.json*")):
        name = re.sub(r"step_\d+", "step_N", str(path.relative_to(folder)))
        if re.search(r"01-sft|evaluations/(base|sft)|export/(?!truestep)", name):
            continue  # as those of the other stage, or written by transformers
        text = path.read_text()
        rows = (
            [json.loads(line) for line in text.splitlines()[:2]]
            if path.suffix == ".jsonl"
            else [json.loads(text)]
        )
        found[name] = [shortened(row) for row in (rows if "samples" in name else rows[:1])]
    return found


def shortened(value: Any) -> Any:
    """Return a JSON value with only the first of several similar things."""
    if isinstance(value, dict):
        kept = [
            (key, inner) for key, inner in value.items() if key.split("/")[1:2] != ["work"]
        ]  # many metrics
        is_similar = len(kept) > 1 and all(
            isinstance(v, dict) and v.keys() == kept[0][1].keys() for _, v in kept
        )
        return {key: shortened(inner) for key, inner in (kept[:1] if is_similar else kept)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [shortened(value[0])]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        made = {RECORDED: described(Path(scratch)), EXAMPLES: examples(Path(scratch))}
        for path, document in made.items():
            path.write_text(
                json.dumps(document, indent=1, sort_keys=path == RECORDED, ensure_ascii=False) + "\n"
            )
