"""``truestep eval``, which evaluates a model on benchmarks or data sets; its other commands need no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from truestep.cli.data import columns_of
from truestep.cli.output import echo
from truestep.cli.progress import announce
from truestep.cli.run import Json, Resume
from truestep.errors import UserError, count

DEFAULT = (
    "model"  # what ``truestep eval WORD`` means if WORD is not another command; WORD may be a folder "model"
)
HELP = (
    "Evaluate a model: truestep eval MODEL --benchmarks ..., truestep eval RECIPE, or a command below. "
    "truestep eval model --help lists the options of an evaluation."
)


def _argument(text: str) -> Any:
    return typer.Argument(help=text, show_default=False)


def option(flag: str, text: str, default: bool | str = True, **more: Any) -> Any:
    """Declare an option. If its real default explains nothing, the help shows ``default`` instead."""
    return typer.Option(flag, help=text, show_default=default, **more)


_MODEL = "A model (folder, hub id, or its name on a server), or a recipe (.toml)."
_IDS = "Comma-separated ids (truestep eval list shows them all), or files and folders of your own: PATH or NAME=PATH."
_OWN_FILE = "One benchmark, with the same meaning as in --benchmarks. Can be repeated; needed for a path with a comma."
_COLUMN = "Name a column of your own benchmarks, such as answer=label. It applies to the files that have it. Can be repeated."
_SCORER = (
    "Also score every sample with a reward: FILE.py:FUNCTION, or a name such as format. Can be repeated."
)
_TEMPLATES = (
    "Comma-separated prompt templates: paper, qwen, plain, question, completion, brief, odd, FILE.toml."
)
_SHOTS = "How many worked examples to show before each problem."
_DATA = "Folder with one file per benchmark: ID.jsonl, ID.parquet or ID.csv."
_LIMIT = "How many problems of each benchmark to use."
_ENGINE = "torch, vllm, or the URL of an OpenAI-compatible endpoint."
_LOGS = "Logs from lm-eval, lighteval or inspect, or folders of such logs."
_OWN = "each benchmark's own"
_SET = "Change any other setting, such as --set temperature=0. Can be repeated."
_DRY_RUN = "Check everything, and print upper bounds for tokens and memory; do not sample."
_SECOND = "Also grade every answer with math-verify, and count disagreements."
_SCORE = "The score to use if a log has several."
Metric = Annotated[str, option("--metric", _SCORE, "math_verify if logged, otherwise the first")]
_MEAN = "What is compared: correct, or the mean of a scorer of both evaluations. In a log, the score to use."
Folder = Annotated[Path, option("--out", "The folder to write to.", False)]
Logged = Annotated[Path, _argument("A run directory, a samples file, or a log from another harness.")]


def words_of(text: str) -> list[str]:
    """Split a comma-separated option into words."""
    return [word.strip() for word in text.split(",") if word.strip()]


def evaluate(
    model: Annotated[str, typer.Argument(help=_MODEL, metavar="MODEL", show_default=False)],
    benchmarks: Annotated[str, option("--benchmarks", _IDS)] = "",
    benchmark: Annotated[list[str] | None, option("--benchmark", _OWN_FILE, False)] = None,
    column: Annotated[list[str] | None, option("--column", _COLUMN, False, metavar="OURS=THEIRS")] = None,
    scorer: Annotated[list[str] | None, option("--scorer", _SCORER, False)] = None,
    data: Annotated[str, option("--data", _DATA, "the Hugging Face hub")] = "",
    limit: Annotated[int | None, option("--limit", _LIMIT, "all", min=1)] = None,
    samples: Annotated[int | None, option("--samples", "Samples per problem.", _OWN, min=1)] = None,
    prompts: Annotated[str, option("--prompts", _TEMPLATES, _OWN)] = "",
    few_shot: Annotated[int | None, option("--few-shot", _SHOTS, "0", min=0)] = None,
    engine: Annotated[str, option("--engine", _ENGINE, "torch")] = "",
    overrides: Annotated[list[str] | None, option("--set", _SET, False)] = None,
    out: Annotated[Path | None, option("--out", "The run directory.", "runs/NAME-HASH")] = None,
    tasks: Annotated[str, typer.Option("--tasks", hidden=True, help="What lm-eval calls --benchmarks.")] = "",
    resume: Resume = False,
    dry_run: Annotated[bool, option("--dry-run", _DRY_RUN)] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on benchmarks, or a training recipe's model on the recipe's own data sets."""
    if tasks:
        raise UserError(f"there is no option --tasks; pass --benchmarks {tasks}")
    announce(f"truestep eval: reading {model} and the benchmarks")
    from truestep.cli import evaluation_actions

    given: dict[str, Any] = {
        "benchmarks": [*words_of(benchmarks), *(benchmark or ())], "folder": data, "limit": limit,
        "benchmark_columns": columns_of(column or ()),
        "scorers": [{"function": name} for name in scorer or ()], "samples_per_problem": samples,
        "prompts": words_of(prompts), "few_shot": few_shot, "engine": engine,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value not in (None, "", [], {})}
    how = {"resume": resume, "dry_run": dry_run, "as_json": as_json}
    evaluation_actions.evaluate(model, given, overrides or (), out, **how)


def list_benchmarks(as_json: Json = False) -> None:
    """List the pinned benchmarks, each with its rows, hash, source, template, samples and published score."""
    from truestep.evaluate.benchmarks import SHUFFLE_SEED, TABLE

    lines = []
    for b in TABLE:
        source = f"hub:{b.hub.rstrip(':')}" if b.hub else "local file only"
        published = f"; the paper's SFT→RL: {b.published['SFT→RL']}" if b.published else ""
        note = f"; note: {b.mind}" if b.mind else ""
        line = f"{b.id:<14} {b.num_rows:>6} rows {b.content[:12]:<12} avg@{b.samples:<2} {b.prompt:<5}"
        lines.append(f"{line} {source}{published}{note}")
    document = {"shuffle_seed": SHUFFLE_SEED, "benchmarks": [asdict(b) for b in TABLE]}
    echo(json.dumps(document) if as_json else "\n".join(lines))


def compare(
    a: Logged, b: Logged,
    metric: Annotated[str, option("--metric", _MEAN, "correct")] = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Compare two evaluations of the same problems. Print the paired difference B - A on every task that both
    have, with its 95 % interval, its p-values and the smallest detectable difference. Of a training run, its last
    checkpoint is compared; RUN/evaluations/base is that of its base model."""
    announce(f"truestep eval compare: reading {a} and {b}")
    from truestep.evaluate.import_compare import compare_evaluations

    found = compare_evaluations(a, b, metric)
    lines = [_sentence(row) for row in found["comparisons"]]
    left_over = ((path, found[side]) for side, path in (("only_in_a", a), ("only_in_b", b)))
    lines += [f"not compared (only in {path}): {', '.join(tasks)}" for path, tasks in left_over if tasks]
    echo(json.dumps(found) if as_json else "\n".join(lines))


def _differing(path: str, other: str) -> str:
    """Return the part of a path that differs from the other, such as the run's name; the whole path if it has none."""
    own, beside = Path(path).parts, Path(other).parts
    same = [a == b for a, b in zip(own, beside, strict=False)]
    first = same.index(False) if False in same else len(same)
    own, beside = own[first:], beside[first:]
    while own and beside and own[-1] == beside[-1]:
        own, beside = own[:-1], beside[:-1]
    return str(Path(*own)) if own else path


def _sentence(row: dict[str, Any]) -> str:
    is_share = row["metric"] == "correct"
    scale, form = (100, ".1f") if is_share else (1, ".3g")

    def ends(of: dict[str, Any], sign: str = "") -> str:
        low, high = of["low"], of["high"]
        known = f" [{scale * low:{sign}{form}}, {scale * high:{sign}{form}}]" if low is not None else ""
        return known or " [no interval]"

    def side(s: dict[str, Any], other: dict[str, Any]) -> str:
        which = "" if s["path"] == other["path"] else _differing(s["path"], other["path"])
        seed = "" if s["seed"] is None else f"seed {s['seed']}"
        made_by = ", ".join(dict.fromkeys(filter(None, [s["made_by"], which, s["of"], seed])))
        lost = "" if is_share or not s["unscored"] else f", {count(s['unscored'], 'sample')} without it"
        return f"{scale * s['score']:{form}}{' %' * is_share}{ends(s)} ({made_by}{lost})"

    least = (
        "unknown"
        if row["detectable"] is None
        else f"{scale * row['detectable']:{form}}{' points' * is_share}"
    )
    exact = "" if row["p_exact"] is None else f" (exact {row['p_exact']:.3g})"
    p_value = "" if row["p_value"] is None else f", p = {row['p_value']:.3g}{exact}"
    name = row["task"] if is_share else f"{row['task']}, mean {row['metric']}"
    more, less = ("better", "worse") if is_share else ("higher", "lower")
    a, b = side(row["a"], row["b"]), side(row["b"], row["a"])
    return (
        f"{name}: {a} → {b}: {scale * row['difference']:+{form}}{' points' * is_share}"
        f"{ends(row, '+')}{p_value}, detectable with 80 % power: {least}; {count(row['num_problems'], 'problem')}, "
        f"{row['num_better']} {more}, {row['num_worse']} {less}, paired by {row['paired_by']}"
    )


def import_logs(
    files: Annotated[list[Path], _argument(_LOGS)], out: Folder, metric: Metric = "", as_json: Json = False
) -> None:
    """Import logs from other harnesses as a run directory with a report. Verdicts are kept, and nothing is
    graded again."""
    announce(f"truestep eval import: reading {', '.join(map(str, files))}")
    from truestep.evaluate.import_compare import import_evaluations
    from truestep.report.evaluation import write_evaluation_report

    summary = import_evaluations(files, out, metric)
    if not as_json:
        echo("\n".join(summary["notes"]))
    show(out, summary, write_evaluation_report(out), as_json)


def show(folder: Path, summary: dict[str, Any], report: Path, as_json: bool) -> None:
    """Print the result of an evaluation on stdout."""
    if as_json:
        echo(json.dumps({"run_dir": str(folder), "report": str(report), **summary}))
        return
    from truestep.report.tables import print_scores, score_table

    print_scores(score_table(folder), title=folder.name)
    echo(f"report: {report}")
    echo(str(folder))


def export(run: Annotated[Path, _argument("A run directory.")], out: Folder, as_json: Json = False) -> None:
    """Write the results and samples of a run in the layout of lm-evaluation-harness."""
    from truestep.evaluate.external_logs import write_lm_eval

    written = [str(path) for path in write_lm_eval(run, out)]
    echo(json.dumps({"files": written}) if as_json else "\n".join(written))


def overlap(
    source: Annotated[str, _argument("Training data: a .jsonl or .parquet file, a folder, or hub:org/name.")],
    benchmarks: Annotated[str, option("--benchmarks", "Comma-separated ids.", "all in --data")] = "",
    data: Annotated[str, option("--data", "Folder with the benchmarks.", "the Hugging Face hub")] = "",
    as_json: Json = False,
) -> None:
    """Count how many problems of each benchmark are also in a training set. A problem counts if a training
    problem has the same text or shares 13 words in a row with it."""
    announce(f"truestep eval overlap: comparing {source} with the benchmarks")
    from truestep.evaluate.benchmarks import contamination

    report = contamination(source, words_of(benchmarks), data)
    lines = [
        f"{pair['evaluation']:<16} {pair['num_evaluation']:>6} problems: {pair['exact']['num_evaluation']} same text, "
        f"{pair['ngram']['num_evaluation']} share {report['ngram_words']} words, "
        f"{pair['ngram']['num_short']} too short"
        for pair in report["pairs"]
    ]
    lines += [f"{id:<16} not checked, because --data has no file for it" for id in report["missing"]]
    echo(json.dumps(report) if as_json else "\n".join([*lines, *report["notes"]]))


def grade(
    pairs: Annotated[Path, _argument("A file of JSON lines with the fields gold and pred.")],
    workers: Annotated[int, option("--workers", "Processes for symbolic algebra.", min=1)] = 2,
    second: Annotated[bool, option("--second", _SECOND)] = False,
    as_json: Json = False,
) -> None:
    """Grade every (gold, pred) pair in a file, without a model. Optional fields: id, kind ("choice" for
    multiple choice), choices."""
    announce(f"truestep eval grade: grading the pairs in {pairs}")
    from truestep.evaluate.pair_rows import read_pairs
    from truestep.grade.pairs import grade_pairs, table

    result = grade_pairs(read_pairs(pairs, announce), workers=workers, second_opinion=second)
    echo(json.dumps(result) if as_json else table(result))


COMMANDS: dict[str, Callable[..., None]] = {
    DEFAULT: evaluate, "list": list_benchmarks, "compare": compare, "import": import_logs, "export": export,
    "overlap": overlap, "grade": grade,
}  # fmt: skip


def app() -> typer.Typer:
    """Make the group of ``eval`` commands."""
    group = typer.Typer(help=HELP, no_args_is_help=True)
    for name, function in COMMANDS.items():
        group.command(name)(function)
    return group


def with_default(words: Sequence[str]) -> list[str]:
    """Return the command line with ``eval MODEL`` changed to ``eval model MODEL``, unless it is already written so."""
    is_whole = len(words) > 2 and words[1] == DEFAULT and (words[2] == "--help" or words[2][:1] != "-")
    if is_whole or len(words) < 2 or words[0] != "eval":
        return list(words)
    if words[1] not in {*COMMANDS, "--help"} - {DEFAULT}:
        return ["eval", DEFAULT, *words[1:]]
    return list(words)
