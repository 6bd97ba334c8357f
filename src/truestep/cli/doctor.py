"""``truestep doctor`` and ``truestep doctor gpu``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Exit, Option, Typer

from truestep.cli.output import echo

if TYPE_CHECKING:
    from truestep.doctor.checks import Bench, Check, Outcome

app = Typer(
    help="Show what is installed, or check what this machine's GPUs compute.", invoke_without_command=True
)
_ONLY = "Make only this check. Can be repeated."
_JSON = "Also write the results, versions and the card to this file."
_CONFIG = "A config.json of the model whose shape is used. Without it, the shape of Qwen2.5-Math-7B."
_VLLM = "The Python of an environment with vLLM, for the check of its weights."
_LIST = "List the checks and exit."
_DRY = "Say which checks would be made here, and exit."


@app.callback(invoke_without_command=True)
def installed(context: Context) -> None:
    """Show what is installed, or check what this machine's GPUs compute."""
    if context.invoked_subcommand is not None:
        return
    from truestep.doctor.installed import lines

    for name, found in lines():
        echo(f"{name:<14} {found}")


@app.command()
def gpu(
    only: Annotated[list[str] | None, Option("--only", metavar="NAME", help=_ONLY)] = None,
    json_file: Annotated[Path | None, Option("--json", metavar="FILE", help=_JSON)] = None,
    config: Annotated[Path | None, Option("--config", metavar="FILE", help=_CONFIG)] = None,
    vllm: Annotated[str, Option("--vllm", metavar="PYTHON", help=_VLLM)] = "",
    lists: Annotated[bool, Option("--list", help=_LIST)] = False,
    dry_run: Annotated[bool, Option("--dry-run", help=_DRY)] = False,
) -> None:
    """Check that truestep computes the same on this machine's GPU as in float64 on its processor, and how fast.

    Takes at most 10 minutes on one GPU, with random weights. Without a GPU, small versions of the checks run on the
    processor.

    Exit codes: 0 nothing failed · 1 a check failed · 2 usage error · 130 interrupted, with finished checks written.
    """
    from truestep.doctor.gpu import bench_of, chosen

    checks = chosen(only or ())
    if lists:
        for check in checks:
            echo(f"{check.name:<12} {check.what} (about {check.seconds} s on a GPU)")
        raise Exit
    with tempfile.TemporaryDirectory(prefix="truestep-doctor-") as folder:
        bench = bench_of(Path(folder), config, vllm)
        where = "the processor, with small models: no GPU was found" if bench.is_small else str(bench.device)
        echo(f"checks on {where}", err=True)
        if dry_run:
            for check in checks:
                skips = bench.is_small and bool(check.needs)
                echo(f"{check.name:<12} {f'SKIP (needs {check.needs})' if skips else 'runs'}")
            raise Exit
        found, is_whole = _made(checks, bench)
        if json_file is not None:
            from truestep.doctor.gpu import document
            from truestep.rundir import write_atomic

            write_atomic(json_file, json.dumps(document(found, bench), indent=1, allow_nan=False) + "\n")
    counts = {kind: sum(o.verdict == kind for o in found) for kind in ("PASS", "FAIL", "SKIP")}
    echo(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    raise Exit(130 if not is_whole else 1 if counts["FAIL"] else 0)


def _made(checks: Sequence[Check], bench: Bench) -> tuple[list[Outcome], bool]:
    """Make the checks and print each. Return what was found, and whether none was interrupted."""
    from truestep.doctor.gpu import examine

    found: list[Outcome] = []
    try:
        for outcome in examine(checks, bench):
            found.append(outcome)
            on = f" on {outcome.ran_on}" if outcome.ran_on else ""
            echo(
                f"{outcome.verdict} {outcome.check:<12} {outcome.seconds:6.1f} s{on}  {outcome.reason}".rstrip()
            )
            for number in outcome.numbers:
                echo(f"       {number}")
    except KeyboardInterrupt:
        echo(f"interrupted: {len(found)} of {len(checks)} checks were made", err=True)
        return found, False
    return found, True
