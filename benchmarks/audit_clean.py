"""Count false alarms: no run of a correct trainer may be accused, over seeds, precisions, ranks and model classes.

    python benchmarks/audit_clean.py [--seeds 10] [--python PATH ...] [--out results/audit-clean/clean.json]

A run is accused if its verdict is FAULT. DEFAULT is allowed: it says that the step computes another mean, which is the
same for every split.

Runs that are already in the file are not repeated (delete the file to repeat everything), so this script may
be interrupted.

A run is one configuration with the rows of one seed. All seeds of a configuration share their processes,
because importing a framework takes most of the time. Without --python the subjects in this environment are
run; each further environment adds the subjects that the earlier ones do not have.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from truestep.audit import subjects as registry
from truestep.audit.environments import virtual as environment
from truestep.audit.environments.launch import LEARNING_RATE, Job, SubjectFailed
from truestep.audit.environments.launch import run as run_job
from truestep.audit.measure import cases
from truestep.audit.measure.findings import Verdict
from truestep.audit.measure.verdict import judge
from truestep.audit.present.words import found_in_words, row_of
from truestep.audit.subjects import Configuration, Subject
from truestep.rundir import provenance, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
TORCH = ("torch loop", "torch DDP", "torch FSDP2")
FAULTY = ("transformers Trainer, mixture of experts",)  # in the releases that are run (docs/findings.md)


def variants(subject: Subject) -> Iterator[Configuration]:
    """Return the table's configurations without documented choices, in more precisions and model classes."""
    for configuration in subject.configurations:
        if configuration.documented or not {*configuration.only} <= {*cases.CASES}:  # weight delivery, RL
            continue
        yield configuration
        if subject.name in TORCH:
            for dtype in ("bfloat16", "float64"):
                yield replace(configuration, options={**configuration.options, "dtype": dtype})
            yield replace(configuration, options={**configuration.options, "arch": "llama"})
        elif configuration.options.get("arch") == "llama" and not {"packing", "adapter"} & {
            *configuration.options
        }:
            yield replace(configuration, options={**configuration.options, "arch": "qwen2"})


def run(subject: Subject, configuration: Configuration, python: Path, seeds: range) -> list[dict[str, Any]]:
    """Return one finding per seed, reduced to the fields that are needed here."""
    options = configuration.options
    built = {
        (name, seed): replace(
            cases.build(name, world_size=configuration.world_size, accumulation=accumulation, seed=seed),
            name=f"{name}-{seed}",
        )
        for seed in seeds
        for accumulation in (3 + seed % 4,)
        for name in configuration.only
    }
    job = Job(
        script=subject.script,
        python=python,
        cases=list(built.values()),
        options=options,
        learning_rate=LEARNING_RATE[str(options.get("optimizer", "sgd"))],
        world_size=configuration.world_size,
        timeout=1200,
    )
    shown = configuration.to_json()
    try:
        runs = run_job(job)
    except SubjectFailed as error:
        return [{"subject": subject.name, "configuration": shown, "verdict": "NOT RUN", "what": str(error)}]
    rows = []
    for seed in seeds:
        mine = {name: runs[f"{name}-{seed}"] for name in configuration.only}
        finding = judge(subject.name, shown, mine)
        rows.append(
            {
                "subject": subject.name,
                "configuration": shown,
                "seed": seed,
                "verdict": finding.verdict.value,
                "what": found_in_words(row_of(finding)),
                "relative_error": finding.relative_error,
                "noise": finding.noise,
            }
        )
    return rows


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    verdicts = Counter(r["verdict"] for r in rows)
    counts = {"right": verdicts[Verdict.RIGHT.value], "accused": verdicts[Verdict.FAULT.value]}
    real = sum(r["subject"] not in (*TORCH, "truestep") for r in rows)
    return {"provenance": provenance(0), "runs": len(rows), **counts, "real": real, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--python", action="append", default=[], help="the Python of a further environment; may be repeated"
    )
    parser.add_argument(
        "--only", default="", help="only subjects whose name contains one of these, comma-separated"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/audit-clean/clean.json")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = read_json(given.out)["rows"] if given.out.is_file() else []
    rows = [r for r in rows if r["verdict"] != Verdict.NOT_RUN]
    kept = [(r["subject"], r["configuration"]) for r in rows]
    commit = provenance(0)["commit"]
    began = time.monotonic()
    done: set[str] = set()
    wanted = [text.strip().lower() for text in given.only.split(",")]
    for python in [sys.executable, *given.python]:
        for subject in registry.applicable(environment.installed(Path(python))):
            if subject.name in (*done, *FAULTY) or not any(text in subject.name.lower() for text in wanted):
                continue
            done.add(subject.name)
            for configuration in variants(subject):
                if (subject.name, configuration.to_json()) in kept:
                    continue
                found = run(subject, configuration, Path(python), range(given.seeds))
                rows += [{**row, "commit": commit} for row in found]
                write_json(given.out, document(rows))
                wrong = [r for r in found if r["verdict"] != Verdict.RIGHT]
                print(
                    f"{time.monotonic() - began:5.0f} s  {subject.name} {configuration.to_json()}: {len(found)} runs, "
                    f"{len(wrong)} not RIGHT {[r['what'][:100] for r in wrong[:2]]}",
                    file=sys.stderr,
                    flush=True,
                )
    told = document(rows)
    print(
        f"{told['runs']} runs ({told['real']} on frameworks): {told['right']} RIGHT, {told['accused']} accused; {given.out}"
    )
    return 1 if told["accused"] else 0


if __name__ == "__main__":
    sys.exit(main())
