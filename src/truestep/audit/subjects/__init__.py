"""The subjects of an audit: an adapter for each framework, and the table of how each one is audited.

An adapter is a file with a function ``run`` for a child process and a literal ``SUBJECTS``. Adapters import
each other by bare names. The table is read from these literals, without importing any framework. An entry has

* name, and needs (the distributions without which the script cannot run, with the audited one first);
* brings (frameworks that are installed with the audited one, even if they are not named);
* configurations, which have options of the script, and the keys processes (one number or several), cases,
  without and documented. The entry itself may also set these keys, for all its configurations.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CASES = ("ragged", "unsplit", "masked", "window", "whole")
ENGINE = (
    "ragged",
    "unsplit",
    "masked",
    "whole",
)  # a loop feeds an engine, which never sees the end of an epoch
# A step function, whose micro-batches the audit makes itself.
OWN = (*CASES, "reordered", "padded", "masked_unsplit", "repeated")
RL = ("whole", "split", "reused", "minibatches")
GROUPS = {"CASES": CASES, "ENGINE": ENGINE, "RELATED": ("clipped", "scheduled", "resumed"), "RL": RL}
OWN_MODELS = ("reused", "tied")  # in which a layer is used twice, or has the input table's weight
ARCHS = ("plain", "llama", "qwen2", "gemma3", "gpt2", "neox", "opt")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to use a framework. ``documented`` names a non-default option that changes the step on purpose;
    ``only`` has the cases that make sense here; ``without`` has cases that cannot run, with the reason;
    ``unused`` has settings of a user's file that change the step and that the subject cannot use."""

    options: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1
    documented: str = ""
    only: tuple[str, ...] = CASES
    without: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a finding describes it."""
        return {**self.options, "processes": self.world_size}


@dataclass(frozen=True)
class Subject:
    """An entry of the table; ``script`` is the adapter's file without its suffix."""

    name: str
    script: str
    needs: tuple[str, ...]
    configurations: Sequence[Configuration]
    brings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What is audited, as the adapter's name ends: "rl" (RL steps), "delivery" (of weights) or "" (SFT steps)."""
        ending = self.script.rpartition("_")[2]
        return ending if ending in ("rl", "delivery") else ""


def read(folder: Path) -> tuple[Subject, ...]:
    """Return the subjects of all adapters in a folder."""
    return tuple(s for path in sorted(folder.glob("*.py")) for s in _subjects_of(path))


def _subjects_of(path: Path) -> Iterator[Subject]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUBJECTS":
            for entry in ast.literal_eval(node.value):
                keys = ("processes", "cases", "without", "documented")
                shared = {key: entry[key] for key in keys if key in entry}
                own = entry.get("configurations", [{}])
                made = [one for options in own for one in _configurations({**shared, **options})]
                needs, brings = tuple(entry["needs"]), tuple(entry.get("brings", ()))
                yield Subject(entry["name"], path.stem, needs, made, brings)


def _configurations(options: dict[str, Any]) -> Iterator[Configuration]:
    """Yield one configuration for each number of processes."""
    processes, cases = options.pop("processes", 1), options.pop("cases", ["CASES"])
    without = options.pop("without", {})
    one = Configuration(
        documented=options.pop("documented", ""),
        only=tuple(name for case in cases for name in GROUPS.get(case, (case,))),
        without=tuple((name, why) for names, why in without.items() for name in names.split(", ")),
        options=options,
    )
    for number in [processes] if isinstance(processes, int) else processes:
        yield replace(one, world_size=number)


TABLE = read(FOLDER)


def applicable(installed: Mapping[str, str]) -> list[Subject]:
    """Return the subjects whose needs are all installed."""
    return [s for s in TABLE if all(name in installed for name in (*s.needs, *s.brings))]


def meant_by(names: Sequence[str]) -> list[Subject]:
    """Return the subjects that a requirement is about. A subject must use all named packages, audit one of
    them, and need no framework that was not named."""
    frameworks = {s.needs[0] for s in TABLE} - {"torch", "accelerate", "transformers"}
    theirs = [s for s in TABLE if set(names) <= {*s.needs, *s.brings} and s.needs[0] in names]
    return [s for s in theirs if not (set(s.needs) & frameworks) - set(names)]


def takes_arch(configuration: Configuration) -> bool:
    """Return whether the configuration runs with any model class."""
    return configuration.options.get("arch", OWN_MODELS[0]) not in OWN_MODELS


def with_arch(subject: Subject, arch: str) -> Subject:
    """Return the subject with a different model class. Configurations that become the same are merged.

    A configuration without a model class, or with a model made for it, is kept.
    """
    changed: list[Configuration] = []
    for c in subject.configurations:
        new = replace(c, options={**c.options, "arch": arch}) if takes_arch(c) else c
        if new not in changed:
            changed.append(new)
    return replace(subject, configurations=changed)
