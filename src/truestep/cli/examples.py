"""One example of every command, which its help and docs/reference/commands.md show."""

from __future__ import annotations

import typer

EXAMPLES = {
    "run": "recipes/demo.toml --out runs/first",
    "sft": "recipes/demo.toml --set stages.sft.steps=10",
    "rl": "recipes/demo.toml --out runs/rl --resume",
    "study": "recipes/study/staircase.toml --dry-run",
    "audit": "deepspeed==0.18.9 --remedy",
    "guard": "truestep_guard.jsonl --html guard.html",
    "report": "runs/first",
    "settings": "stages.sft.optimizer.lr",
    "vllm": "Qwen/Qwen3-0.6B --port 8000 -- --tensor-parallel-size 2",
    "doctor gpu": "--json gpu.json",
    "data check": "my.csv --column problem=question",
    "data show": "recipes/demo.toml --num 1",
    "data convert": "my.csv --to verl --out train.parquet",
    "method list": "--json",
    "method check": "row.py:anneal --option cap=1.5",
    "eval model": "Qwen/Qwen3-0.6B --benchmarks math500,my.jsonl --limit 50",
    "eval list": "--json",
    "eval compare": "runs/before runs/after",
    "eval import": "lm-eval-logs --out runs/imported",
    "eval export": "runs/first --out lm-eval-logs",
    "eval overlap": "train.jsonl --benchmarks math500",
    "eval grade": "pairs.jsonl --second",
}


def put_examples(app: typer.Typer, group: str = "") -> None:
    """Write the example of every command below its help."""
    for command in app.registered_commands:
        name = f"{group} {command.name or getattr(command.callback, '__name__', '')}".strip()
        command.epilog = f"Example: truestep {name.removesuffix(' model')} {EXAMPLES[name]}"
    for inner in app.registered_groups:
        if inner.typer_instance is not None:
            put_examples(inner.typer_instance, str(inner.name))
