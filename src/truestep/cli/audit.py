"""``truestep audit``, which shows what the optimizer step of an installed framework really does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from truestep.cli.run import Json

Target = Annotated[
    str,
    Argument(
        help="NAME==VERSION[+NAME==VERSION] (installed into a separate environment), FILE.py:FUNCTION (your own "
        'step(model, optimizer, microbatches)), or "models" (checks the loss of every model class in '
        "transformers).",
        show_default="what --python has installed",
    ),
]
Python = Annotated[
    Path | None,
    Option(
        help="Audit the packages installed in this Python, without changing them.",
        show_default="the current one",
    ),
]
Only = Annotated[str, Option(help="Audit only subjects whose name contains this text.", show_default="all")]
Arch = Annotated[
    str,
    Option(
        help="Audit with a tiny model of this architecture: plain, llama, qwen2, gemma3, gpt2, neox or opt.",
        show_default="each subject's own",
    ),
]
Config = Annotated[
    Path | None,
    Option(help="Audit the step that this DeepSpeed, Trainer, TRL, accelerate or OpenRLHF file configures."),
]
Bisect = Annotated[
    str, Option(metavar="FIRST..LAST", help="Find the first and last faulty release of NAME in this range.")
]
Past = Annotated[
    Path | None,
    Option(
        help="Check a lock file, or the folder of a finished run, for measured faults; no code is run and no GPU "
        "is needed."
    ),
]
Remedy = Annotated[bool, Option("--remedy", help="Search for options and releases that avoid the fault.")]
DryRun = Annotated[bool, Option("--dry-run", help="List the configurations, but build and run nothing.")]
Reproduce = Annotated[
    Path | None, Option(help="Write a short script for each fault to this folder, and run it.")
]
Objective = Annotated[
    str,
    Option(
        help="What your own step computes: token_mean, sequence_mean, sum, or other (then only its dependence on "
        "the split is judged).",
        show_default="token_mean",
    ),
]
Processes = Annotated[
    int | None,
    Option(
        min=1,
        max=8,
        help="Run your own step on this many processes, with DistributedDataParallel.",
        show_default="1",
    ),
]
Resume = Annotated[
    str,
    Option(
        metavar="SAVE,LOAD",
        help="Also stop your own step and continue it with a new model and optimizer, by two functions of (folder, "
        "model, optimizer) in the same file.",
    ),
]


def audit(
    target: Target = "",
    python: Python = None,
    only: Only = "",
    arch: Arch = "",
    config: Config = None,
    bisect: Bisect = "",
    known_bad: Annotated[str, Option(help="With --bisect: a release that is known to be faulty.")] = "",
    past: Past = None,
    remedy: Remedy = False,
    reproduce: Reproduce = None,
    objective: Objective = "",
    processes: Processes = None,
    resume: Resume = "",
    seed: Annotated[int, Option(min=0, help="Seed for the random training rows.")] = 0,
    timeout: Annotated[float, Option(min=1, help="Stop a configuration after this many seconds.")] = 180.0,
    as_json: Json = False,
    junit: Annotated[Path | None, Option(help="Also write the findings to this file as JUnit XML.")] = None,
    sarif: Annotated[Path | None, Option(help="Also write the findings to this file as SARIF.")] = None,
    html: Annotated[Path | None, Option(help="Also write the findings to this file as an HTML page.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run real optimizer steps on the CPU, and recover the weight of every micro-batch in the update.

    Exit codes: 0 no fault · 1 a fault · 2 usage error · 3 nothing could be run · 4 a result is inconclusive ·
    130 interrupted.
    """
    from truestep.cli.progress import announce

    announce(f"truestep audit: looking at {past or config or target or python or 'the installed packages'}")
    from truestep.cli import audit_actions as actions
    from truestep.errors import UserError

    if past is not None and (dry_run or junit or sarif or html):
        raise UserError("--past can only print text or --json; remove --dry-run, --junit, --sarif and --html")
    if past is not None:
        actions.past(past, as_json=as_json)
        return
    if dry_run and (bisect or target == "models"):
        raise UserError("--bisect and models have no list of configurations; remove --dry-run")
    own = {"objective": objective, "processes": processes, "resume": resume}
    if bisect:
        options = {"known_bad": known_bad, "only": only}
        actions.bisect(target, bisect, **options, seed=seed, timeout=timeout, as_json=as_json)
        return
    if target == "models":
        actions.models(python, timeout=timeout, as_json=as_json)
        return
    if dry_run:
        actions.show_plan(target, python, only=only, arch=arch, config=config, own=own, as_json=as_json)
        return
    # Same as Ctrl-C: end the child processes and show what is done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    subjects, chosen = actions.select(target, python, only=only, arch=arch, config=config, own=own)
    remedies = target if remedy else None
    findings = actions.run(
        subjects, chosen, seed=seed, timeout=timeout, remedies_for=remedies, reproducers=reproduce
    )
    if not target and config is None:
        findings += actions.absent(chosen, only)
    actions.show(findings, as_json=as_json, files={"junit": junit, "sarif": sarif, "html": html})
    raise Exit(actions.exit_code(findings))
