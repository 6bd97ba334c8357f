"""The Python interface: train, evaluate, compare, grade and audit, with what the command line uses.

    import truestep
    run = truestep.train("recipe.toml")
    run.scores, run.metrics("rl")["reward"], run.model

``truestep.train`` is short for ``truestep.api.train``, and so on. Progress goes to stderr. All errors that a user can
mend are ``truestep.errors.UserError`` with one sentence. Held by: tests/api/test_api.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep import rundir
from truestep.errors import UserError, did_you_mean
from truestep.signals import Interrupted

if TYPE_CHECKING:
    import numpy as np

    from truestep.audit.measure.findings import Finding

PathLike = str | Path
RUN_FILES = ("resolved.toml", "summary.json")
NAMES = ("Audit", "Run", "train", "evaluate", "compare", "grade", "audit")


@dataclass(frozen=True)
class Run:
    """A run directory: of ``train``, ``evaluate`` or the commands. Everything is read from its files when asked for.

    >>> run = Run("runs/gsm8k-1a2b3c4d")
    >>> run.scores[0]["score"]
    0.25
    """

    folder: PathLike

    def __post_init__(self) -> None:
        """Raises UserError if the folder is not a run directory."""
        _require_run(self.path)

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.folder)

    def __fspath__(self) -> str:
        """A run can be used where a folder is asked for, for example as a model: that of its last finished stage."""
        return os.fspath(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json. Raises UserError if there is none."""
        found = (
            rundir.read_json(self.path / "summary.json") if (self.path / "summary.json").exists() else None
        )
        if not isinstance(found, dict):
            raise UserError(f"{self.path} contains no run with a summary")
        return found

    @property
    def status(self) -> str:
        """running, interrupted, failed or done."""
        return str(self.summary["status"])

    @property
    def scores(self) -> list[dict[str, Any]]:
        """One row per checkpoint (or prompt) and data set: score, low and high (95 % interval), n, and more."""
        return list(self.summary["scores"])

    @property
    def stages(self) -> list[str]:
        """The names of the stages that have begun, in order."""
        return [path.name.partition("-")[2] for path in sorted(self.path.glob("stages/[0-9][0-9]-*"))]

    def metrics(self, stage: str = "") -> dict[str, np.ndarray]:
        """Return the metrics of a stage (by default the last one) by name, with the key ``step``. A step without a
        value has NaN. docs/metrics.md explains the names."""
        import numpy as np

        rows = rundir.read_jsonl(self._stage(stage) / "metrics.jsonl")
        short = [{key.partition("/")[2] or key: value for key, value in row.items()} for row in rows]
        names = dict.fromkeys(name for row in short for name in row)
        return {name: np.array([row.get(name, np.nan) for row in short], dtype=float) for name in names}

    def frame(self, stage: str = "") -> Any:
        """Return the metrics of a stage as a pandas DataFrame with one row per step. Raises UserError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError:
            raise UserError("Run.frame needs pandas; install it, or use Run.metrics") from None
        return pandas.DataFrame(self.metrics(stage)).set_index("step")

    def checkpoints(self, stage: str = "") -> list[Path]:
        """Return the folders of a stage's checkpoints that are kept, oldest first."""
        return sorted((self._stage(stage) / "checkpoints").glob("step_*"))

    @property
    def model(self) -> Path:
        """The Hugging Face folder of the last finished stage. Raises UserError if no stage is finished."""
        return rundir.model_of(self.path)

    def samples(self, data: str = "", group: str = "") -> list[dict[str, Any]]:
        """Return the samples of an evaluation: of the data set (or benchmark) ``data`` and the checkpoint (or prompt)
        ``group``, by default the last ones. ``samples("rl")`` also works, if no data set has the checkpoint's name."""
        from truestep.evaluate.files import read_samples, samples_of

        if data and not group and all(data != row["data"] for row in self.scores):
            data, group = "", data
        rows = [
            row for row in self.scores
            if data in ("", row["data"]) and group in ("", row.get("checkpoint"), row.get("prompt"))
        ]  # fmt: skip
        if not rows:
            known = sorted(
                {f"{row['data']} · {row.get('checkpoint') or row.get('prompt')}" for row in self.scores}
            )
            raise UserError(
                f"{self.path} has no samples of {' · '.join(filter(None, (data, group)))}; it has {', '.join(known) or 'none'}"
            )
        return read_samples(samples_of(self.path, rows[-1]))

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    def _stage(self, name: str) -> Path:
        found = [
            p for p in sorted(self.path.glob("stages/[0-9][0-9]-*")) if name in ("", p.name.partition("-")[2])
        ]
        if not found:
            raise UserError(f'{self.path} has no stage "{name}"; it has {", ".join(self.stages) or "none"}')
        return found[-1]

    def _last_metrics(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and one row for each stage: its last step, and what it logged there."""
        names = ("step", "loss", "reward", "validation/loss", "dev/score", "learning_rate")
        found = []
        for stage in self.stages:
            values = self.metrics(stage)
            # Without the steps that have no value, which are NaN.
            last = {name: column[column == column] for name, column in values.items() if name in names}
            found.append({name: f"{column[-1]:.6g}" for name, column in last.items() if len(column)})
        used = [name for name in names if any(name in row for row in found)]
        cells = [[s, *(row.get(n, "–") for n in used)] for s, row in zip(self.stages, found, strict=True)]
        return ["stage", *used], cells

    def _repr_html_(self) -> str:
        """For notebooks: the table of scores or, without an evaluation, of the last metrics of each stage."""
        from html import escape

        from truestep.report import tables

        rows = tables.score_table(self.path)
        headings, cells = tables.cells_of(rows, tables.score_columns(rows)) if rows else self._last_metrics()
        head = "".join(f"<th>{escape(text)}</th>" for text in headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in cells
        )
        return f"<p><code>{escape(str(self.path))}</code></p><table><tr>{head}</tr>{body}</table>"


def _require_run(folder: Path) -> None:
    if any((folder / name).is_file() for name in RUN_FILES):
        return
    near = sorted({p.parent.name for name in RUN_FILES for p in folder.parent.glob(f"*/{name}")})
    known = f"; {folder.parent} has the runs {', '.join(near[:10])}" if near else ""
    fault = "is not a run directory" if folder.exists() else "does not exist"
    inner = any((folder / "run" / name).is_file() for name in RUN_FILES)  # the cell of a study
    below = f"; its run is {folder / 'run'}" if inner else ""
    hint = below or did_you_mean(folder.name, near) or known or "; pass the folder that a run printed"
    raise UserError(f"{folder} {fault}{hint}")


def train(
    recipe: PathLike | Mapping[str, Any],
    *,
    out: PathLike = "",
    resume: bool = False,
    overrides: Sequence[str] = (),
    change: Sequence[str] = (),
    strict: bool = False,
    quiet: bool = False,
) -> Run:
    """Run a recipe: its stages and evaluations. ``recipe`` is a TOML file or its table, whose paths are then relative
    to the current folder; ``overrides`` are KEY=VALUE, as of ``--set``. ``out`` is the run directory, by default
    runs/NAME-HASH. With ``resume``, an interrupted run is continued. ``change`` and ``strict`` are ``--change`` and ``--strict``.

    Raises UserError for a bad recipe, bad data or a folder that is in use, before anything is trained. After Ctrl-C,
    the finished work is saved and KeyboardInterrupt is raised.

    >>> run = train("recipes/demo.toml", overrides=["stages.sft.steps=10"])
    """
    from truestep.cli.progress import ConsoleReporter
    from truestep.cli.run import How, checked, folder_of, trained
    from truestep.settings import Settings, load_settings, override, parse
    from truestep.train.parallel import join

    if isinstance(recipe, Mapping):
        base = Path()
        settings = parse(Settings, override(_plain(recipe), overrides), where="the recipe")
    elif not isinstance(recipe, str | os.PathLike):
        raise UserError(f"truestep.train needs the path of a recipe or a table, got {type(recipe).__name__}")
    else:
        base, settings = Path(recipe).parent, load_settings(Path(recipe), overrides)
    how, ranks = How(change=change, resume=resume, strict=strict), join()
    folder, reporter = (
        folder_of(settings, Path(out) if out else None),
        ConsoleReporter(quiet=quiet or ranks.rank != 0),
    )
    prepared, _ = checked(settings, base, folder, how, ranks, reporter)
    try:
        trained(prepared, folder, how, ranks, reporter)
    except Interrupted as stop:
        raise _stopped(stop, folder) from None
    return Run(folder)


def evaluate(
    model: PathLike,
    benchmarks: Sequence[str] | str,
    *,
    out: PathLike = "",
    resume: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Evaluate a model (folder, run, hub id or name on a server) on benchmarks: ids of pinned ones, or files and folders of
    your own. ``settings`` are further keys of an evaluation's recipe, such as limit, samples, prompts, few_shot, engine,
    temperature, max_new_tokens, columns, checker, data (a folder with the pinned benchmarks) and scorers (names,
    FILE.py:FUNCTION, or tables). ``overrides`` are KEY=VALUE, as of ``--set``.

    Raises UserError, also if a benchmark is not as pinned. After Ctrl-C, KeyboardInterrupt is raised; every finished sample is
    saved.

    >>> evaluate("Qwen/Qwen3-0.6B", ["math500", "my.jsonl"], limit=50).scores
    """
    from truestep.cli.evaluation_actions import evaluated, folder_of
    from truestep.cli.progress import ConsoleReporter
    from truestep.evaluate.jobs import check_overrides, evaluation_settings
    from truestep.settings import override

    named = [benchmarks] if isinstance(benchmarks, str) else list(benchmarks)
    check_overrides([*settings, *overrides], "truestep.evaluate:")
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"truestep.evaluate needs a model's folder, id or run, got {type(model).__name__}")
    table = override(_plain({"model": {"path": model}, "benchmarks": named, **settings}), overrides)
    asked = evaluation_settings(table, "truestep.evaluate")
    folder = folder_of(asked, Path(out) if out else None)
    try:
        evaluated(asked, Path(), folder, resume=resume, reporter=ConsoleReporter(quiet=quiet))
    except Interrupted as stop:
        raise _stopped(stop, folder) from None
    return Run(folder)


def _plain(value: Any) -> Any:
    """Return a copy of a table in which paths (and runs) are texts, as in a file."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else deepcopy(value)


def _stopped(stop: Interrupted, folder: Path) -> KeyboardInterrupt:
    return KeyboardInterrupt(
        f"{stop}; all finished work is saved. To continue, make the same call with out={str(folder)!r}, resume=True"
    )


def compare(a: PathLike | Run, b: PathLike | Run, metric: str = "") -> dict[str, Any]:
    """Compare two evaluations of the same problems: run directories, or logs of lm-eval, lighteval and inspect. Return
    ``comparisons``, one row per task: difference b − a, low, high, p_value, detectable (80 % power), and the sides.
    Of a training run, its last checkpoint is compared; ``RUN/evaluations/base`` is that of its base model. ``metric`` is
    "correct" (the default), the name of a scorer that both have, or the score of a log to use.

    >>> compare("runs/before", "runs/after")["comparisons"][0]["difference"]
    """
    from truestep.evaluate.import_compare import compare_evaluations

    return compare_evaluations(Path(a), Path(b), metric)


def grade(gold: str, completion: str, *, choices: Sequence[str] = ()) -> dict[str, Any]:
    """Grade one completion: verdict (correct, incorrect or unscored), strict and lenient verdicts, the extracted answer,
    how it was found, and the reason. For many, use ``truestep.grade.pairs.grade_pairs``.

    >>> grade("1/2", r"So the answer is \\boxed{0.5}.")["verdict"]
    'correct'
    """
    from truestep.grade.pairs import Pair, grade_pairs

    pair = Pair(id="1", gold=gold, pred=completion, choices=tuple(choices))
    found: dict[str, Any] = grade_pairs([pair], workers=1)["samples"][0]
    return found


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found. ``print`` shows it in words.

    >>> Audit(finding).verdict
    'RIGHT'
    """

    finding: Finding

    @property
    def verdict(self) -> str:
        """RIGHT, DEFAULT, FAULT, NOT OBSERVABLE or NOT RUN."""
        return str(self.finding.verdict)

    @property
    def codes(self) -> list[str]:
        """The names of what differs from the mean over all trained tokens, the main one first."""
        return list(self.finding.codes)

    @property
    def weights(self) -> list[float]:
        """The weight that each micro-batch of one step had in the update; 1 is right."""
        return list(self.finding.weights[0]) if self.finding.weights else []

    @property
    def tokens(self) -> list[int]:
        """The trained tokens of each micro-batch of that step."""
        return list(self.finding.tokens[0]) if self.finding.tokens else []

    def __repr__(self) -> str:
        from truestep.audit.present.words import as_text, row_of

        return f"{self.verdict}: {as_text(row_of(self.finding))}"


def audit(
    step: Callable[..., Any],
    *,
    arch: str = "plain",
    accumulation: int = 4,
    seed: int = 0,
    objective: str = "token_mean",
    resume: Sequence[Callable[..., Any]] = (),
) -> Audit:
    """Audit your own training step, ``step(model, optimizer, microbatches)``, in this process: what weight did every
    micro-batch get in the update? ``arch`` is the tiny model: plain, llama, qwen2, gemma3, gpt2, neox or opt.
    ``objective`` is what the step computes: token_mean, sequence_mean, sum or other. With ``resume = (save, load)``, two
    functions of (folder, model, optimizer), the step is also stopped after two steps, and continued with a new model
    and optimizer. If no case can be run, the error of the step is raised. For installed frameworks, use ``truestep audit``.

    >>> audit(my_step).verdict
    'RIGHT'
    """
    from truestep.audit.environments.in_process import audit_function
    from truestep.audit.measure.verdict import check_objective

    if not callable(step):
        raise UserError(
            f"truestep.audit needs a function step(model, optimizer, microbatches), got {type(step).__name__}"
        )
    if resume and not (len(resume) == 2 and all(map(callable, resume))):
        raise UserError(
            "truestep.audit: resume needs two functions, (save, load), of (folder, model, optimizer)"
        )
    try:
        check_objective(objective)
    except ValueError as error:
        raise UserError(str(error)) from None
    how: dict[str, Any] = {"arch": arch, "accumulation": accumulation, "seed": seed, "objective": objective}
    return Audit(audit_function(step, **how, resume=resume))
