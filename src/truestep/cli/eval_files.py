"""``truestep eval list | compare | import | export | overlap``: what works on files, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from truestep.cli.run import Json

Metric = Annotated[
    str, typer.Option("--metric", help="The score to read if a log has several.", show_default="the only one")
]
Folder = Annotated[Path, typer.Option("--out", help="The folder to write into.", show_default=False)]


def list_benchmarks(as_json: Json = False) -> None:
    """Every pinned benchmark: rows, content hash, source, template, samples, published figures."""
    from dataclasses import asdict

    from truestep.evaluate.benchmarks import SHUFFLE_SEED, TABLE

    if as_json:
        typer.echo(json.dumps({"shuffle_seed": SHUFFLE_SEED, "benchmarks": [asdict(b) for b in TABLE]}))
        return
    for b in TABLE:
        source = f"hub:{b.hub.rstrip(':')}" if b.hub else "local file only"
        published = f"; SFT→RL of the paper {b.published['SFT→RL']}" if b.published else ""
        typer.echo(
            f"{b.id:<14} {b.num_rows:>6} rows {b.content[:12]:<12} avg@{b.samples:<2} {b.prompt:<5} {source}{published}"
            + (f"; mind: {b.mind}" if b.mind else "")
        )


def compare(
    a: Annotated[Path, typer.Argument(help="A run directory, a samples file, or another harness's log.")],
    b: Annotated[Path, typer.Argument(help="What is compared with it, on the same problems.")],
    metric: Metric = "",
    as_json: Json = False,
) -> None:
    """The paired difference b - a of every task that both have: interval, p-values, smallest detectable
    difference."""
    from truestep.cli.progress import announce

    announce(f"truestep eval compare: reading {a} and {b}")
    from truestep.evaluate.bring import compare_evaluations

    found = compare_evaluations(a, b, metric)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for row in found["comparisons"]:
        typer.echo(_sentence(row))
    for side, path in (("only_in_a", a), ("only_in_b", b)):
        if found[side]:
            typer.echo(f"not compared, only in {path}: {', '.join(found[side])}")


def _sentence(row: dict[str, Any]) -> str:
    def side(s: dict[str, Any]) -> str:
        seed = "" if s["seed"] is None else f", seed {s['seed']}"
        return (
            f"{100 * s['score']:.1f} % [{100 * s['low']:.1f}, {100 * s['high']:.1f}] ({s['made_by']}{seed})"
        )

    least = "unknown" if row["detectable"] is None else f"{100 * row['detectable']:.1f}"
    return (
        f"{row['task']}: {side(row['a'])} → {side(row['b'])}: {100 * row['difference']:+.1f} points "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], p = {row['p_value']:.3g} (exact {row['p_exact']:.3g}), "
        f"detectable with 80 % power: {least} points; {row['num_problems']} problems, {row['num_better']} better, "
        f"{row['num_worse']} worse, paired by {row['paired_by']}"
    )


def import_logs(
    files: Annotated[
        list[Path], typer.Argument(help="Logs of lm-eval, lighteval or inspect, or folders of them.")
    ],
    out: Folder,
    metric: Metric = "",
    as_json: Json = False,
) -> None:
    """Write other harnesses' samples as a run of ours, with intervals and a page; verdicts are taken as they
    stand."""
    from truestep.cli.progress import announce

    announce(f"truestep eval import: reading {', '.join(map(str, files))}")
    from truestep.evaluate.bring import import_evaluations
    from truestep.report.evaluation import print_scores, write_evaluation_report

    summary = import_evaluations(files, out, metric)
    report = write_evaluation_report(out)
    if as_json:
        typer.echo(json.dumps({"run_dir": str(out), "report": str(report), **summary}))
        return
    print_scores(summary)
    typer.echo(f"report: {report}")
    typer.echo(str(out))


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")], out: Folder, as_json: Json = False
) -> None:
    """Write a run's results and samples in lm-evaluation-harness's layout."""
    from truestep.evaluate.foreign import write_lm_eval

    written = [str(path) for path in write_lm_eval(run, out)]
    typer.echo(json.dumps({"files": written}) if as_json else "\n".join(written))


def overlap(
    source: Annotated[
        str, typer.Argument(help="Training data: a .jsonl or .parquet file, a folder, or hub:org/name.")
    ],
    benchmarks: Annotated[
        str,
        typer.Option(
            "--benchmarks",
            help="Comma-separated ids from `truestep eval list`.",
            show_default="all that are found",
        ),
    ] = "",
    data: Annotated[
        str,
        typer.Option("--data", help="Folder with ID.jsonl, ID.parquet or ID.csv.", show_default="the hub"),
    ] = "",
    as_json: Json = False,
) -> None:
    """How many problems of each benchmark a training set holds: equal texts, and shared runs of 13 words."""
    from truestep.cli.progress import announce

    announce(f"truestep eval overlap: comparing {source} with the benchmarks")
    from truestep.evaluate.contamination import contamination

    report = contamination(source, [w.strip() for w in benchmarks.split(",") if w.strip()], data)
    if as_json:
        typer.echo(json.dumps(report))
        return
    for pair in report["pairs"]:
        typer.echo(
            f"{pair['evaluation']:<16} {pair['num_evaluation']:>6} problems: {pair['exact']['num_evaluation']} equal, "
            f"{pair['ngram']['num_evaluation']} share {report['ngram_words']} words, "
            f"{pair['ngram']['num_short']} too short"
        )
    for id in report["missing"]:
        typer.echo(f"{id:<16} not looked at: no file of it")
