"""The pages docs/stack/: for each framework, which releases with which settings are hit by a measured fault."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stack_data import ROOT

from truestep.audit.postmortem.measured import FAULTY, UNSEEN, Measured, Measurement, faults, foreign, numbers
from truestep.audit.present.past import (
    conditions_in_words,
    fault_in_words,
    fixes,
    need_in_words,
    plain_sentence,
    releases_in_words,
)
from truestep.audit.present.words import configuration_in_words, line

PAGES = ROOT / "docs/stack"
NAMES = {
    "deepspeed": "DeepSpeed",
    "llamafactory": "LLaMA-Factory",
    "openrlhf": "OpenRLHF",
    "trl": "TRL",
}  # others are written as in the index
# kind of a fault → what a user sees of it; a kind that is not here is shown with its sentence
SYMPTOMS = {
    "kept_first_and_last": "gradient accumulation trains only on the first and the last micro-batch",
    "kept_last": "gradient accumulation trains only on the last micro-batch",
    "micro_mean": "gradient accumulation is not the same as a larger batch: tokens of short micro-batches count more",
    "accumulation_missing": "the gradient grows with the number of accumulation steps",
    "rank_mean": "the gradient depends on how the rows are split over the GPUs: tokens of ranks with few tokens count "
    "more",
    "not_finite_after_empty": "the loss or the parameters become NaN after a micro-batch without trained tokens",
    "step_sizes": "gradient accumulation continues across the end of an epoch",
    "window_over_end": "gradient accumulation continues across the end of an epoch",
    "ends_early": "the last rows are never trained on",
    "rows_lost": "the last rows are never trained on",
}
LOSS = {
    frozenset({True}): "The logged loss shows it.",
    frozenset({False}): "The logged loss looks right.",
    frozenset({True, False}): "The logged loss shows it only in some of the audited steps.",
}


def page(title: str, *parts: str) -> str:
    return "\n".join([f"# {title}\n", *(part.rstrip("\n") + "\n" for part in parts)])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def name_of(package: str) -> str:
    return NAMES.get(package, package)


def file_of(package: str) -> str:
    return {"llamafactory": "llama-factory.md"}.get(package, f"{package}.md")


def weights(measurement: Measurement) -> str:
    """Return the weights, with a line for each rank."""
    return ";<br>".join(" ".join(f"{w:.3g}" for w in rank) for rank in measurement.weights)


def symptom(measured: Measured) -> str:
    told = [SYMPTOMS.get(kind) or plain_sentence(kind) for kind in measured.kinds]
    return "; ".join(dict.fromkeys(told)) if all(told) else fault_in_words(measured)


def heading(measured: Measured) -> str:
    """Return the symptom, and the settings with which it occurs."""
    settings = [need_in_words(need) for need in measured.needs]
    return f"{measured.subject}: {symptom(measured)}" + (f" ({', '.join(settings)})" if settings else "")


def steps(found: Iterable[Measurement], releases: Sequence[str] = ()) -> list[str]:
    """Return a table of steps, and the tokens that their weights belong to."""
    rows = {
        (" ".join([m.version, *(f"with {n} {m.versions[n]}" for n in releases)]),
         configuration_in_words(m.configuration), weights(m)): m for m in found
    }  # fmt: skip
    tokens = dict.fromkeys("; ".join(" ".join(map(str, rank)) for rank in m.tokens) for m in rows.values())
    counted = " · ".join(f"{len(t.split('; '))} rank{'s' * (';' in t)}: {t}" for t in tokens)
    return [
        table(("release", "audited step", "weights"), list(rows)),
        f"Trained tokens of these micro-batches: {counted}.",
    ]


def fault(measured: Measured, everything: Sequence[Measurement]) -> list[str]:
    """Return the parts of a page about one fault."""
    package, newest = measured.package, measured.faulty[-1]
    seen = frozenset(m.loss_shows_it for m in measured.shown if m.loss_shows_it is not None)
    what = line(fault_in_words(measured), 600)
    told = f"What was measured: {what}. {LOSS.get(seen, '')}".strip()
    between = f" Right: {', '.join(measured.right)}." if measured.right else " Right: no audited release."
    hit = [f"Hit: {package} {releases_in_words(measured)} (audited: {', '.join(measured.faulty)}).{between}"]
    hit += [f"Only with: {'; '.join(conditions_in_words(measured))}."]
    only = [m for m in measured.shown if m.kinds == measured.kinds]  # without faults of dependencies
    parts = [f"## {heading(measured)}", told, bullets(hit), *steps(only or measured.shown)]
    commands = {
        "truestep audit --past FILE": "reads a lock file, or the folder of a finished run; no code is run",
        "truestep audit --python VENV/bin/python": "runs the steps of your installed releases",
        next(m.command for m in reversed(measured.shown)): f"runs the steps of {package} {newest}",
    }
    parts += ["See it in your stack:", bullets(f"`{command}` {what}" for command, what in commands.items())]
    changes = fixes(measured)
    parts += [
        f"Fix (measured right): {'; or '.join(changes)}."
        if changes
        else "Fix: no change was found that is right."
    ]
    links = (
        [f"Upstream: {', '.join(f'[{short(url)}]({url})' for url in measured.links)}."]
        if measured.links
        else []
    )
    scripts = dict.fromkeys(m.reproducer for m in measured.shown if m.reproducer)
    if scripts:
        shown = ", ".join(f"[{i + 1}](../../results/audit/reproducers/{s})" for i, s in enumerate(scripts))
        links.append(f"Scripts that show it without truestep: {shown}.")
    through = [m for m in measured.through if m in everything]
    if through:
        users = dict.fromkeys(f"[{m.package} {m.version}]({file_of(m.package)})" for m in through)
        links.append(f"Also measured through {', '.join(users)}.")
    return parts + links


def short(url: str) -> str:
    """Return owner/name#number of a GitHub address."""
    parts = url.split("/")
    return f"{parts[-3]}#{parts[-1]}"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {text}" for text in lines)


def reached(package: str, everything: Sequence[Measurement], found: Sequence[Measured]) -> list[str]:
    """Return the parts about faults of dependencies that were measured through this framework."""
    parts = []
    for other in found:
        mine = [m for m in other.through if m.package == package]
        if mine:
            link = f"[{name_of(other.package)}]({file_of(other.package)})"
            only_foreign = all(set(m.kinds) <= foreign(m, everything)[other.package] for m in mine)
            parts += [
                f"## Through {heading(other)}",
                f"The fault is in {link}, whose page says which releases are hit and what the fix is.",
                *steps(mine, [other.package]),
            ]
            parts += [] if only_foreign else ["Some of these steps also have the faults above."]
    return parts


def right_steps(mine: Sequence[Measurement]) -> list[str]:
    """Return a table with the releases in which each configuration was right."""
    by: dict[tuple[str, str], list[str]] = {}
    for m in mine:
        if m.verdict not in (*FAULTY, *UNSEEN):
            by.setdefault((m.subject, configuration_in_words(m.configuration)), []).append(m.version)
    if not by:
        return []
    subjects = len({subject for subject, _ in by}) > 1
    rows = [
        (f"{subject}: {what}" if subjects else what, ", ".join(sorted(set(versions), key=numbers)))
        for (subject, what), versions in by.items()
    ]
    return ["## Right", table(("audited step", "releases"), rows)]


def not_seen(mine: Sequence[Measurement]) -> list[str]:
    told = [
        f"{m.version}, {configuration_in_words(m.configuration)}: {line(m.reason, 160)}"
        for m in mine
        if m.verdict in UNSEEN
    ]
    return ["## Not measured", bullets(told)] if told else []


def of_package(package: str, everything: Sequence[Measurement], found: Sequence[Measured]) -> str:
    name = name_of(package)
    mine = [m for m in everything if m.package == package]
    own = [f for f in found if f.package == package]
    through = reached(package, everything, found)
    subjects = ", ".join(dict.fromkeys(m.subject for m in mine))
    audited = ", ".join(sorted({m.version for m in mine}, key=numbers))
    hits = bullets([f"{package} {releases_in_words(f)}, {heading(f)}" for f in own])
    summary = hits or f"No fault of {name} was found in the audited releases ({audited})." + (
        " Faults of packages that it uses were found, see below." if through else ""
    )
    sources = dict.fromkeys((m.command, m.commit, m.file) for m in mine)
    lines = [
        f"`{command}`: {f'commit {commit}, ' if commit else ''}[{Path(file).name}](../../{file})"
        for command, commit, file in sources
    ]
    return page(
        f"{name}: is my stack hit?",
        f"`python benchmarks/stack.py` makes this page from results/audit/ (audited: {subjects}). The weights say how "
        "much the tokens of each micro-batch counted in one optimizer step; 1 is correct. A semicolon separates ranks. "
        "[audit.md](../audit.md) says how they are measured, and [findings.md](../findings.md) lists all results. A "
        "release between two audited ones is inferred to be like them if they agree; otherwise it is unknown.",
        summary,
        *(part for f in own for part in fault(f, everything)),
        *through,
        *right_steps(mine),
        *not_seen(mine),
        "## Provenance",
        bullets(lines),
    )


def index(packages: Sequence[str], found: Sequence[Measured]) -> str:
    lines = []
    for package in packages:
        own = [f for f in found if f.package == package]
        link = f"[{name_of(package)}]({file_of(package)})"
        lines += [f"{link} {releases_in_words(f)}, {heading(f)}" for f in own]
        used = dict.fromkeys(name_of(f.package) for f in found for m in f.through if m.package == package)
        if not own:
            lines.append(f"{link}: " + (f"only through {', '.join(used)}" if used else "no fault was found"))
    return page(
        "Is my stack hit?",
        "`python benchmarks/stack.py` makes these pages from results/audit/. For each framework, they say which releases, "
        "with which settings, take a wrong optimizer step: it was measured by running the real step "
        "([audit.md](../audit.md)).",
        bullets(lines),
        "Check your own stack; no code is run:",
        bullets(
            [
                "`truestep audit --past FILE` reads pip freeze, requirements, uv.lock, poetry.lock, pylock.toml, "
                "Pipfile.lock, conda list, environment.yml or a Dockerfile",
                "`truestep audit --past DIR` also reads the settings of a finished run",
            ]
        ),
        'The answer for every fault is "affected", "affected if" (with settings that your files do not give), '
        '"not affected" or "unknown" (the release was not measured, or files contradict each other), with the reasons.',
    )


def pages(everything: Sequence[Measurement]) -> dict[Path, str]:
    """Return the pages with their content."""
    found = faults(everything)
    packages = sorted({m.package for m in everything}, key=lambda package: name_of(package).lower())
    made = {PAGES / file_of(package): of_package(package, everything, found) for package in packages}
    return {PAGES / "README.md": index(packages, found), **made}
