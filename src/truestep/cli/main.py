"""``truestep``: the verbs, and one place where errors become one line and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import typer

from truestep import __version__

EXIT = {"settings": 2, "could not run": 3, "resources": 5}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"truestep {__version__}")
        raise typer.Exit


def _app() -> typer.Typer:
    from truestep.cli import audit, data, evaluation, method, report, study
    from truestep.cli import run as verbs

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,  # Rich takes "[default: ...]" for markup and drops it
        pretty_exceptions_enable=False,
        help="SFT-then-RL training in which every optimizer step is provably the one that was asked for.",
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        """Exit codes: 0 done · 2 usage, settings, data · 3 could not run · 5 resources · 130/143 interrupted,
        saved."""

    app.command("run")(verbs.run)
    app.command("sft")(verbs.sft)
    app.command("rl")(verbs.rl)
    app.command("study")(study.study)
    app.command("audit")(audit.audit)
    app.command("report")(report.report)
    app.add_typer(data.app, name="data")
    app.add_typer(method.app, name="method")
    app.add_typer(evaluation.app(), name="eval")
    return app


def _lazily(module: str, name: str) -> Any:
    """An exception class, or, if its module has not been imported, a class that matches nothing."""
    found = sys.modules.get(module)
    return getattr(found, name) if found is not None else type("Absent", (Exception,), {})


def main() -> None:
    """Entry point. A user's error is one line on stderr, never a traceback."""
    try:
        from truestep.cli.evaluation import with_default

        _app()(args=with_default(sys.argv[1:]))
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith("truestep"):
            message = f'the package {error.name} is not installed; pip install "truestep[train]"'
            _fail(message, EXIT["could not run"])
        raise
    except MemoryError:
        way_out = "lower tokens_per_microbatch or sampling.max_running, which do not change the update"
        _fail(f"out of memory; {way_out}", EXIT["resources"])
    except Exception as error:
        if isinstance(error, _lazily("truestep.errors", "UserError")):
            _fail(str(error), EXIT["settings"])
        if isinstance(error, _lazily("truestep.checkpoint.store", "OutOfSpace")):
            _fail(str(error), EXIT["resources"])
        for module, name in (
            ("truestep.train.step", "NonFiniteError"),
            ("truestep.train.weight_sync", "StaleWeightsError"),
            ("truestep.rollout.sampling", "NonFiniteLogitsError"),
            ("truestep.audit.environments.virtual", "BuildFailed"),
        ):
            if isinstance(error, _lazily(module, name)):
                _fail(str(error), EXIT["could not run"])
        raise


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
