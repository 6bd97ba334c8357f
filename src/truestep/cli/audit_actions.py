"""The actions of ``truestep audit``: choose the subjects and a Python, run the subjects, show findings."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer

from truestep.audit import subjects as registry
from truestep.audit.environments import configured, releases
from truestep.audit.environments import virtual as environment
from truestep.audit.environments.launch import SubjectFailed, audit_one, run_script, sweep
from truestep.audit.measure.findings import Finding, Verdict, cause
from truestep.audit.measure.verdict import OBJECTIVES
from truestep.audit.present import formats, reproduce, words
from truestep.audit.subjects import Subject
from truestep.cli.output import PlainConsole, echo
from truestep.errors import UserError
from truestep.rundir import provenance, write_atomic

INTERRUPTED = cause("", "interrupted")


def say(text: str) -> None:
    echo(text, err=True)


def select(
    target: str,
    python: Path | None,
    *,
    only: str,
    arch: str,
    config: Path | None = None,
    own: Mapping[str, Any] = MappingProxyType({}),
    build: bool = True,
) -> tuple[list[Subject], Path]:
    """Return the subjects to audit and the Python to run them with. If ``target`` is a requirement, a Python
    environment is built for it; with ``build=False``, the requirement is returned instead. A configuration
    file selects one subject with one configuration. ``own`` has the objective and the number of processes of an
    own loop, if they are given. Raises UserError if there is nothing to audit."""
    if arch and arch not in registry.ARCHS:
        raise UserError(f"--arch {arch} is unknown; pass {', '.join(registry.ARCHS)}")
    if re.fullmatch(r"[^=]*\.py|[^=+]*[/.\w]:\w*", target) and ".py:" not in target:
        raise UserError(f"{target} is not FILE.py:FUNCTION; pass your loop in that form")
    if ".py:" in target:
        if config is not None or only:
            raise UserError(f"{target} has only one configuration; remove --config and --only")
        return [_own_loop(target, arch, **own)], _program(python)
    if given := [f"--{name}" for name, value in own.items() if value]:
        raise UserError(f"{' and '.join(given)} apply only to FILE.py:FUNCTION; remove them")
    if target and python is not None:
        raise UserError(f"{target} and --python cannot be combined; pass only one of them")
    if config is not None:
        return _as_configured(config, target, python, arch)
    if target:
        subjects = _named(registry.meant_by(list(environment.parse(target))), only, target)
        chosen = environment.build(target, say=say) if build else Path(target)
    else:
        chosen = _program(python)
        subjects = _named(registry.applicable(environment.installed(chosen)), only, str(chosen))
    return _on(arch, subjects), chosen


def _as_configured(config: Path, target: str, python: Path | None, arch: str) -> tuple[list[Subject], Path]:
    subject, notes = configured.read(config)
    chosen = environment.build(target, say=say) if target else _program(python)
    missing = [n for n in (*subject.needs, *subject.brings) if n not in environment.versions(chosen)]
    if missing:
        raise UserError(
            f"--config {config} configures {subject.name}, but {missing[0]} is not installed in {chosen}; "
            "either pass --python with an environment that has it, or give a requirement to install (such as "
            f"{environment.EXAMPLE}) as the argument"
        )
    for note in notes:
        say(f"{config}: {note}")
    return _on(arch, [subject]), chosen


def _program(python: Path | None) -> Path:
    """Return the Python to audit, by default the current one."""
    chosen = shutil.which(str(python or sys.executable))
    if chosen is None:
        raise UserError(f"--python {python} does not exist; pass a virtual environment's bin/python")
    return Path(chosen).absolute()


def _own_loop(
    target: str, arch: str, objective: str = "", processes: int | None = None, resume: str = ""
) -> Subject:
    """Make a subject from ``FILE.py:FUNCTION``, and ``SAVE,LOAD`` in the same file."""
    if objective and objective not in OBJECTIVES:
        raise UserError(f"--objective {objective} is unknown; pass {', '.join(OBJECTIVES)}")
    file, _, function = target.rpartition(":")
    path = Path(file).absolute()
    if not path.is_file():
        raise UserError(f"{file} does not exist; pass FILE.py:FUNCTION")
    options: dict[str, Any] = {"file": str(path), "function": function, "arch": arch or "plain"}
    if objective:
        options["objective"] = objective
    cases: tuple[str, ...] = registry.OWN
    if resume:
        names = [name.strip() for name in resume.split(",")]
        if len(names) != 2 or not all(names):
            raise UserError(f"--resume {resume}: pass SAVE,LOAD, two functions in {path.name}")
        options["resume"], cases = names, (*cases, "resumed")
    one = registry.Configuration(options=options, world_size=processes or 1, only=cases)
    return Subject(f"{path.name}:{function}", "user_loop", ("torch",), [one])


def _named(subjects: Sequence[Subject], only: str, where: str) -> list[Subject]:
    found = [s for s in subjects if only.lower() in s.name.lower()]
    if not found:
        known = ", ".join(s.name for s in (subjects or registry.TABLE))
        narrowed = f" whose name contains {only!r}" if only else ""
        raise UserError(f"{where} has nothing to audit{narrowed}; known: {known}")
    return found


def _on(arch: str, subjects: Sequence[Subject]) -> list[Subject]:
    if not arch:
        return list(subjects)
    if not any(registry.takes_arch(c) for s in subjects for c in s.configurations):
        names = ", ".join(s.name for s in subjects)
        raise UserError(f"--arch {arch} does not apply to {names}; remove it")
    return [registry.with_arch(s, arch) for s in subjects]


def show_plan(target: str, python: Path | None, *, as_json: bool, **narrowed: Any) -> None:
    """Print what would be run, with the arguments of ``select``. No environment is built."""
    subjects, chosen = select(target, python, **narrowed, build=False)
    pairs, where = [(s.name, c) for s in subjects for c in s.configurations], str(chosen)
    if as_json:
        rows = [{"subject": name, "configuration": c.to_json(), "cases": c.only} for name, c in pairs]
        echo(json.dumps({"schema": 1, "python": where, "planned": rows}))
        return
    echo(f"{'python' if os.sep in where else 'environment'}: {where}")
    for name, c in pairs:
        echo(f"{name}: {words.configuration_in_words(c.to_json())} ({', '.join(c.only)})")


def run(
    subjects: Sequence[Subject],
    python: Path,
    *,
    seed: int,
    timeout: float,
    remedies_for: str | None = None,
    reproducers: Path | None = None,
) -> list[Finding]:
    """Audit all subjects, with progress on stderr. If ``remedies_for`` (the target) is given, search for a
    remedy for each fault. If ``reproducers`` (a folder) is given, write one script per fault to it. After
    Ctrl-C or SIGTERM, the remaining configurations get the verdict NOT RUN."""
    pairs = [(s, c) for s in subjects for c in s.configurations]
    findings: list[Finding] = []
    began = time.monotonic()
    try:
        for index, (subject, configuration) in enumerate(pairs):
            seconds = (time.monotonic() - began) / max(1, index) * (len(pairs) - index)
            left = f", about {seconds:.0f} s left" if index else ""
            said = words.configuration_in_words(configuration.to_json())
            say(f"audit {index + 1}/{len(pairs)}  {subject.name}: {said}{left}")
            finding = audit_one(subject, configuration, python, seed=seed, timeout=timeout)
            if finding.verdict is Verdict.FAULT and remedies_for is not None:
                say("  looking for a remedy")
                better = releases.remedy(subject, configuration, python, remedies_for, timeout=timeout)
                finding = replace(finding, remedy=better or "none found")
            if finding.verdict is Verdict.FAULT and reproducers is not None:
                finding = _reproduced(finding, subject, python, reproducers)
            findings.append(finding)
    except KeyboardInterrupt:
        say(f"interrupted after {len(findings)} of {len(pairs)} configurations; the others are NOT RUN")
        for s, c in pairs[len(findings) :]:
            findings.append(Finding(subject=s.name, configuration=c.to_json(), reasons=(INTERRUPTED,)))
    return findings


def _reproduced(finding: Finding, subject: Subject, python: Path, folder: Path) -> Finding:
    """Write the fault's script and run it. The returned finding says whether the script shows the fault."""
    text = reproduce.script(finding, subject.script)
    if not text:
        say("  no reproducer: there is no template for this subject")
        return finding
    shown = words.configuration_in_words(finding.configuration)
    versions = [v for k, v in finding.versions.items() if k != "torch"]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{subject.name} {' '.join(versions)} {shown}").strip("-")
    path = folder / f"{name}.py"
    write_atomic(path, text)
    with tempfile.TemporaryDirectory(prefix="truestep-reproduce-") as home:
        shows, line = run_script(path, python, int(finding.configuration.get("processes", 1)), Path(home))
    say(f"  {path}: {line}")
    outcome = {True: "shows it", False: "does not show it", None: "did not run"}[shows]
    return replace(finding, reproducer=f"{path.name} {outcome}: {line}")


def absent(python: Path, only: str) -> list[Finding]:
    """Return a finding for each subject that is not installed, so that its absence is not taken for RIGHT."""
    findings, found = [], environment.installed(python)
    for s in registry.TABLE:
        missing = [n for n in (*s.needs, *s.brings) if n not in found]
        if missing and only.lower() in s.name.lower():
            findings.append(Finding(subject=s.name, reasons=(cause("", "not_installed", packages=missing),)))
    return findings


def show(findings: Sequence[Finding], *, as_json: bool, files: Mapping[str, Path | None]) -> None:
    stamp, rows = provenance(0), [words.row_of(f) for f in findings]
    if junit := files.get("junit"):
        write_atomic(junit, formats.to_junit(rows))
    if sarif := files.get("sarif"):
        write_atomic(sarif, json.dumps(formats.to_sarif(rows), indent=1))
    if html := files.get("html"):
        from truestep.audit.present.page import render_page

        write_atomic(html, render_page(rows, stamp))
    if as_json:
        echo(json.dumps(formats.to_document(rows, stamp), allow_nan=False))
        return
    from truestep.audit.present.table import findings_table

    _print(lambda width: findings_table(rows, width=width))


def _print(table: Callable[[int], Any]) -> None:

    console = PlainConsole()
    console.print(table(min(console.width, 120)))


def exit_code(findings: Sequence[Finding]) -> int:
    verdicts = {f.verdict for f in findings}
    if any(INTERRUPTED in f.reasons for f in findings):
        return 130
    if Verdict.FAULT in verdicts:
        return 1
    if verdicts <= {Verdict.NOT_RUN}:
        return 3
    return 4 if Verdict.NOT_OBSERVABLE in verdicts else 0


def models(python: Path | None, *, timeout: float, as_json: bool) -> None:
    """Audit the loss of every model class of the installed transformers."""
    chosen = _program(python)
    if "transformers" not in environment.installed(chosen):
        raise UserError(
            f"transformers is not installed in {chosen}; pass --python with an environment that has it"
        )
    try:
        document = sweep(chosen, timeout=max(timeout, 600.0))
    except SubjectFailed as error:
        say(f"error: {error}")
        raise typer.Exit(3) from None
    echo(json.dumps(document) if as_json else words.models_in_words(document))
    raise typer.Exit(1 if words.wrong_models(document) else 0)


def past(path: Path, *, as_json: bool) -> None:
    from truestep.audit.postmortem.answers import look_back

    answers = look_back(path)
    if as_json:
        from truestep.audit.present.past import answer_row

        echo(json.dumps({"schema": 2, "path": str(path), "answers": [answer_row(a) for a in answers]}))
    else:
        from truestep.audit.present.table import answers_table

        _print(lambda width: answers_table(answers, width=width))
    found = {a.answer for a in answers}
    raise typer.Exit(1 if "affected" in found else 4 if found - {"not affected"} else 0)


def bisect(
    target: str, text: str, *, known_bad: str, only: str, seed: int, timeout: float, as_json: bool
) -> None:
    """Find the first and the last faulty release of a package. Only its first configuration is run."""
    if not target or "=" in target:
        raise UserError(f"--bisect needs a package name without a version, such as deepspeed, not {target!r}")
    first, last = releases.parse_range(text)
    between = releases.releases_between(Path(sys.executable), target, first, last)
    assumed = "assuming that the faulty releases follow each other without a gap"
    say(f"{len(between)} releases from {first} to {last}; {assumed}")

    def probe(version: str) -> bool | None:
        subjects, python = select(f"{target}=={version}", None, only=only, arch="")
        finding = audit_one(subjects[0], subjects[0].configurations[0], python, seed=seed, timeout=timeout)
        say(f"{target} {version}: {finding.verdict}  {words.found_in_words(words.row_of(finding))}")
        unseen = finding.verdict in (Verdict.NOT_RUN, Verdict.NOT_OBSERVABLE)
        return None if unseen else finding.verdict is Verdict.FAULT

    found = releases.search(between, probe, known_bad)
    document: dict[str, Any] = {"schema": 1, "package": target, "releases": len(between), **vars(found)}
    if as_json:
        echo(json.dumps(document))
    elif found.first_bad:
        bad = f"first faulty release {found.first_bad}, last faulty release {found.last_bad}"
        echo(f"{bad} ({len(found.tried)} releases run)")
    else:
        echo(f"no faulty release found ({len(found.tried)} of {len(between)} run)")
    raise typer.Exit(1 if found.first_bad else 0)
