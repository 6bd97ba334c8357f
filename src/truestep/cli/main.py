"""The ``truestep`` command, and the only place where an error becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, Any

import typer

from truestep import __version__
from truestep.cli.output import echo

# Exceptions that end a command with one line: module, class, exit code.
FAULTS = (
    ("errors", "UserError", 2), ("errors", "OutOfSpace", 5), ("train.step", "NonFiniteError", 3),
    ("rollout.engine", "StaleWeightsError", 3), ("rollout.sampling", "NonFiniteLogitsError", 3),
    ("audit.environments.virtual", "BuildFailed", 3), ("train.watch", "WorthlessError", 1),
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"truestep {__version__}")
        raise typer.Exit


_VERSION = "Print the version and exit."
Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help=_VERSION)]


def _app() -> typer.Typer:
    from truestep.cli import audit, data, doctor, evaluation, guard, method, report, settings, study, vllm
    from truestep.cli import run as verbs
    from truestep.cli.examples import put_examples

    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False,
        rich_markup_mode=None,  # Rich would take "[default: ...]" for markup and drop it
        help="SFT-then-RL training, with tests that every optimizer step is the one you configured.",
    )  # fmt: skip

    @app.callback()
    def root(version: Version = False) -> None:
        """Exit codes: 0 done · 1 a fault was found, or --strict stopped the run · 2 error in usage, settings or data ·
        3 could not run · 5 not enough resources, or a rank was lost · 130/143 interrupted, with all finished work
        saved."""

    app.command("run")(verbs.run)
    app.command("sft")(verbs.sft)
    app.command("rl")(verbs.rl)
    app.command("study")(study.study)
    app.command("audit")(audit.audit)
    app.command("guard")(guard.guard)
    app.command("report")(report.report)
    app.command("settings")(settings.settings)
    app.command("vllm")(vllm.vllm)
    app.add_typer(doctor.app, name="doctor")
    app.add_typer(data.app, name="data")
    app.add_typer(method.app, name="method")
    app.add_typer(evaluation.app(), name="eval")
    put_examples(app)
    return app


def _lazily(module: str, name: str) -> Any:
    """Return an exception class, or, if its module has not been imported, a class that matches nothing."""
    found = sys.modules.get(module)
    return getattr(found, name) if found is not None else type("Absent", (Exception,), {})


def main() -> None:
    """Run the command line. Known errors are printed as one line on stderr, without a traceback."""
    try:
        from truestep.cli.evaluation import with_default

        try:
            _app()(args=with_default(sys.argv[1:]))
        finally:
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()
    except Exception as error:
        message, code = _described(error)
        _end_ranks(error, message, code)
        if message:
            _fail(message, code)
        raise


def _described(error: Exception) -> tuple[str, int]:
    """Return the line and the exit code of a known error, or "" and 1."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("truestep"):
        return f'the {error.name} package is not installed; run pip install "truestep[train]"', 3
    if isinstance(error, MemoryError):
        remedy = "reduce tokens_per_microbatch or sampling.max_running, which do not change the update"
        return f"out of memory; {remedy}", 5
    for module, name, code in FAULTS:
        if isinstance(error, _lazily(f"truestep.{module}", name)):
            return str(error), code
    if _is_out_of_space(error):
        name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        remedy = "free disk space and run the same command again, with --resume if it was a run"
        return f"{name}no space left on the disk; {remedy}", 5
    return (_of_system(error), 2) if isinstance(error, OSError) else ("", 1)


def _end_ranks(error: Exception, message: str, code: int) -> None:
    """If this process is one of several ranks, end them all. Only one of them reports an error."""
    parallel = sys.modules.get("truestep.train.parallel")
    channel = parallel.channel() if parallel is not None else None
    if channel is None:
        return
    from truestep.device import is_collective_error
    from truestep.train.channel import leave_now

    first = message or f"{type(error).__name__}: {error}".partition("\n")[0]
    channel.failed(first, code, follows=is_collective_error(error))
    if message:
        echo(f"error: {message}", err=True)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    leave_now(code)  # the collectives may not be left in order


def _of_system(error: OSError) -> str:
    """Describe an error of the operating system, with the path that it is about."""
    from truestep.rundir import UNFINISHED

    name = error.filename2 or error.filename  # the second is the target of a renaming
    if isinstance(name, str) and name.endswith(UNFINISHED):
        name = os.path.dirname(name)  # a temporary file, in the folder that is written to
    where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) and name else ""
    return f"{where}{error.strerror or str(error) or type(error).__name__}; check the path, its kind and permissions"


def _is_out_of_space(error: Exception) -> bool:
    from truestep.rundir import NO_SPACE

    if isinstance(error, OSError) and error.errno in NO_SPACE:
        try:
            sys.stdout.flush()
        except OSError:  # stdout is on the full disk, and Python would report that again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    # safetensors has the error number only in its message
    return any(f"(os error {number})" in str(error) for number in NO_SPACE)


def _fail(message: str, code: int) -> None:
    echo(f"error: {message}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
