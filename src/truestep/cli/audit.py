"""``truestep audit``: what the optimizer step of an installed framework really does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

_File = Annotated[Path | None, typer.Option(help="Write this format to a file too.", show_default=False)]


def audit(
    target: Annotated[
        str,
        typer.Argument(
            help="NAME==VERSION[+NAME==VERSION]; FILE.py:FUNCTION: your own step(model, optimizer, microbatches); the "
            "word models: the loss of every model class of transformers; nothing: what is installed here.",
            show_default=False,
        ),
    ] = "",
    python: Annotated[
        Path | None, typer.Option(help="Audit what this python has installed; nothing is written there.")
    ] = None,
    only: Annotated[str, typer.Option(help="Subjects whose name holds this text.")] = "",
    arch: Annotated[
        str, typer.Option(help="plain, llama, qwen2, gemma3, gpt2, neox or opt instead of the table's.")
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            help="Audit the step as this DeepSpeed, Trainer, TRL, accelerate or OpenRLHF file configures it."
        ),
    ] = None,
    bisect: Annotated[str, typer.Option(help="FIRST..LAST: first and last faulty release of NAME.")] = "",
    known_bad: Annotated[str, typer.Option(help="A release that is known to be faulty, for --bisect.")] = "",
    past: Annotated[
        Path | None, typer.Option(help="A past run's folder: was it hit? Executes nothing.")
    ] = None,
    remedy: Annotated[
        bool, typer.Option("--remedy", help="For a fault, audit other options and releases too.")
    ] = False,
    reproduce: Annotated[
        Path | None, typer.Option(help="A folder: write and run a short script of its own for every fault.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random rows.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one configuration.")] = 180.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document alone.")] = False,
    junit: _File = None,
    sarif: _File = None,
    html: _File = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be run.")] = False,
) -> None:
    """Run real optimizer steps on a CPU and recover the weight that every micro-batch got.

    Exit codes: 0 no fault · 1 a fault · 2 usage · 3 nothing could be run · 4 something could not be judged ·
    130 interrupted.
    """
    from truestep.cli import audit_actions as actions
    from truestep.errors import UserError

    if past is not None:
        if dry_run or junit or sarif or html:
            raise UserError("--past reads files and has one output more, --json: leave out the other options")
        actions.past(past, as_json=as_json)
        return
    if dry_run and (bisect or target == "models"):
        raise UserError("--dry-run lists the configurations of an audit: it has nothing to list here")
    if bisect:
        actions.bisect(
            target, bisect, known_bad=known_bad, only=only, seed=seed, timeout=timeout, as_json=as_json
        )
        return
    if target == "models":
        actions.models(python, timeout=timeout, as_json=as_json)
        return
    if dry_run:
        actions.show_plan(target, python, only=only, arch=arch, config=config, as_json=as_json)
        return
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: children are ended, what is done is shown
    subjects, chosen = actions.select(target, python, only=only, arch=arch, config=config)
    findings = actions.run(
        subjects,
        chosen,
        seed=seed,
        timeout=timeout,
        remedies_for=target if remedy else None,
        reproducers=reproduce,
    )
    if not target and config is None:
        findings += actions.absent(chosen, only)
    actions.show(findings, as_json=as_json, files={"junit": junit, "sarif": sarif, "html": html})
    raise typer.Exit(actions.exit_code(findings))
