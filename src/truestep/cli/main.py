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
    ("audit.environments.virtual", "BuildFailed", 3),
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"truestep {__version__}")
        raise typer.Exit


_VERSION = "Print the version and exit."
Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help=_VERSION)]


def _app() -> typer.Typer:
    from truestep.cli import audit, data, evaluation, guard, method, report, study, vllm
    from truestep.cli import run as verbs

    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False,
        rich_markup_mode=None,  # Rich would take "[default: ...]" for markup and drop it
        help="SFT-then-RL training, with tests that every optimizer step is the one you configured.",
    )  # fmt: skip

    @app.callback()
    def root(version: Version = False) -> None:
        """Exit codes: 0 done · 2 error in usage, settings or data · 3 could not run · 5 not enough resources
        · 130/143 interrupted, with all finished work saved."""

    app.command("run")(verbs.run)
    app.command("sft")(verbs.sft)
    app.command("rl")(verbs.rl)
    app.command("study")(study.study)
    app.command("audit")(audit.audit)
    app.command("guard")(guard.guard)
    app.command("report")(report.report)
    app.command("vllm")(vllm.vllm)
    app.add_typer(data.app, name="data")
    app.add_typer(method.app, name="method")
    app.add_typer(evaluation.app(), name="eval")
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
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("truestep"):
            _fail(f'the {error.name} package is not installed; run pip install "truestep[train]"', 3)
        raise
    except MemoryError:
        remedy = "reduce tokens_per_microbatch or sampling.max_running, which do not change the update"
        _fail(f"out of memory; {remedy}", 5)
    except Exception as error:
        for module, name, code in FAULTS:
            if isinstance(error, _lazily(f"truestep.{module}", name)):
                _fail(str(error), code)
        if _is_out_of_space(error):
            name = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            remedy = "free disk space and run the same command again, with --resume if it was a run"
            _fail(f"{name}no space left on the disk; {remedy}", 5)
        if isinstance(error, OSError):
            _fail(_of_system(error), 2)
        raise


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
