"""``truestep guard LOG``, which shows what the live guard of a training run found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from truestep.cli.output import PlainConsole, echo
from truestep.cli.run import Json

_LOG = "The JSON Lines file that a guard wrote, or a folder with truestep_guard.jsonl."
_HTML = "Also write the findings to this file as an HTML page."


def guard(
    log: Annotated[Path, Argument(help=_LOG, show_default=False)],
    as_json: Json = False,
    html: Annotated[Path | None, Option(help=_HTML)] = None,
) -> None:
    """Show what the live guard of a training run found.

    Exit codes: 0 no fault · 1 a fault · 2 usage error, or a damaged log · 4 no step of a run could be judged.
    """
    from truestep.cli.progress import announce

    announce(f"truestep guard: reading {log}")
    from truestep.guard.runs import read
    from truestep.guard.shown import runs_table, to_document

    runs = read(log)
    document = to_document(runs)
    if html is not None:
        from truestep.guard.page import render_page
        from truestep.rundir import write_atomic

        write_atomic(html, render_page(runs))
    if as_json:
        echo(json.dumps(document, allow_nan=False))
    else:
        console = PlainConsole()
        console.print(runs_table(runs, min(console.width, 120)))
        if html is not None:
            echo(f"page: {html}")
    verdict = document["verdict"]
    raise Exit(1 if verdict == "FAULT" else 0 if verdict == "RIGHT" else 4)
