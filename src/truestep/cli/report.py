"""``truestep report RUN``, which writes the page of a run or a study again from its files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from truestep.cli.output import echo
from truestep.cli.run import Json


def report(
    run: Annotated[Path, typer.Argument(help="A run directory or a study directory.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write report.html again from the files in a run or study directory, and print the scores."""
    from truestep.cli.progress import announce

    announce(f"truestep report: reading {run}")

    from truestep.errors import UserError

    try:
        _report(run, as_json)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{run} has files that this version of truestep cannot show ({reason}); "
                        "use the version that wrote them, or run it again") from error  # fmt: skip


def _report(run: Path, as_json: bool) -> None:
    from truestep.errors import UserError
    from truestep.evaluate.files import end_summary
    from truestep.report.evaluation import write_evaluation_report
    from truestep.report.html import write_report
    from truestep.report.tables import print_scores, read_summary, score_table
    from truestep.rundir import locked

    if (run / "results.json").is_file() or (run / "resolved.toml").is_file():
        # What a killed writer left goes, unless the folder is in use.
        with contextlib.suppress(UserError), locked(run, apart="run"):
            if read_summary(run).get("status") == "running":
                end_summary(run, "killed")
    if (run / "results.json").is_file():
        from truestep.report.study import write_study

        page = write_study(run)
        if as_json:
            echo(json.dumps({"study_dir": str(run), "report": str(page)}))
            return
        from truestep.cli.study import show
        from truestep.rundir import read_json

        show(run, read_json(run / "results.json"), page, as_json)
        return
    if not (run / "resolved.toml").is_file():
        fault = f"{run} is not a run directory (no resolved.toml)"
        raise UserError(f"{fault}; pass the folder that a run printed")
    evaluation = read_summary(run).get("kind") == "evaluation"
    path = write_evaluation_report(run) if evaluation else write_report(run)
    if as_json:
        echo(json.dumps({"run_dir": str(run), "report": str(path), **read_summary(run)}))
        return
    print_scores(score_table(run), title=run.name)
    echo(f"report: {path}\n{run}")
