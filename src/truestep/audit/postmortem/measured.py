"""Measured steps of real releases (measured.json, written by benchmarks/stack.py), and the faults that follow.

A configuration's key is a condition of a fault if a change of only this key changed the verdict, or if the
release was audited with only one of its values although other releases were audited with several.
Held by: tests/audit/test_measured.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("measured.json")
FAULTY, UNSEEN = ("FAULT", "DOCUMENTED CHOICE"), ("NOT RUN", "NOT OBSERVABLE")
NOTHING = object()  # a key that every configuration has, or that no value turns off
DEFAULT = "default"
Configuration = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """How the files of a run show a key of a configuration.

    ``setting`` names the setting in ``run_files.Evidence`` ("" if no file shows it, which ``hidden`` then says),
    and ``read`` turns its value into the configuration's. ``argument`` is its name in TrainingArguments.
    ``default`` is the value of configurations without the key; with the value ``off``, nothing that the key
    configures is used.
    """

    setting: str
    read: Callable[[Any], Any] = lambda value: value
    default: Any = DEFAULT
    off: Any = NOTHING
    hidden: str = "option_not_shown"
    argument: str = ""


CLASSES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Gemma3ForCausalLM": "gemma3",
    "GPT2LMHeadModel": "gpt2", "GPTNeoXForCausalLM": "neox", "OPTForCausalLM": "opt",
}  # fmt: skip
BOUNDARY = "manual"
# key of a configuration → how files show it; a key that is not here is an error in benchmarks/stack.py
KEYS: Mapping[str, Key] = {
    "stage": Key("zero_stage", default=NOTHING, off=0),
    "zero_stage": Key("zero_stage", default=NOTHING, off=0),
    "offload": Key("offload", {"cpu": True, "none": False}.get, default=NOTHING),
    BOUNDARY: Key("", default=False, hidden="boundary_not_shown"),
    "processes": Key("processes", lambda count: min(count, 2), default=NOTHING),  # 2 stands for several
    "arch": Key("architecture", CLASSES.get, default=NOTHING),
    "average_tokens_across_devices": Key("average_tokens", default=True, argument="average_tokens_across_devices"),
    "packing": Key("packing", default=False, argument="packing"),
    "assistant_only": Key("assistant_only", default=False, argument="assistant_only_loss"),
    **{name: Key(name, argument=name) for name in (
        "loss_type", "beta", "scale_rewards", "mask_truncated_completions", "importance_sampling_level",
        "epsilon_high", "entropy_coef",
    )},
    **{name: Key("") for name in ("adapter", "dataset", "parallel", "remove_padding", "shape", "wrap", "coefficient", "stateful")},
}  # fmt: skip
ROUNDING = ("autocast", "dtype")  # of the audited step; the weights are judged by its measured noise
HIDES = "optimizer"  # AdamW's updates hide most weights; the same configuration was audited with SGD
# subject → the name of its trainer in ``run_files`` ("" if its package and settings are enough)
TRAINERS: Mapping[str, str] = {
    "DeepSpeed": "",
    "transformers Trainer": "transformers Trainer",
    "TRL SFTTrainer": "TRL SFTTrainer",
    "TRL GRPOTrainer": "TRL GRPOTrainer",
    "LLaMA-Factory": "LLaMA-Factory",
    "PEFT in a torch loop": "",
    "PEFT with transformers Trainer": "transformers Trainer",
    "transformers Trainer, mixture of experts": "transformers Trainer",
    "Lightning Trainer.fit": "",
    "axolotl SFT": "",
    "accelerate": "",
    "OpenRLHF SFTTrainer": "OpenRLHF sft",
    "verl agg_loss (function level)": "verl main_ppo",
    "verl SFTTrainer": "verl sft_trainer",
    "verl FSDPSFTTrainer": "verl fsdp_sft_trainer",
    "torchtune SFT recipe": "",
}
# (package, kind of the fault) → where it was reported or repaired
UPSTREAM: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("deepspeed", "kept_first_and_last"): ("https://github.com/deepspeedai/DeepSpeed/pull/7967",),
    ("deepspeed", "kept_last"): ("https://github.com/deepspeedai/DeepSpeed/pull/7981",),
    ("transformers", "micro_mean"): ("https://github.com/huggingface/transformers/issues/34191",),
    ("transformers", "accumulation_missing"): ("https://github.com/huggingface/transformers/pull/35207",),
    ("transformers", "rank_mean"): ("https://github.com/huggingface/transformers/pull/39395",),
    ("openrlhf", "micro_mean"): ("https://github.com/OpenRLHF/OpenRLHF/pull/1249",),
    ("verl", "mask_early"): ("https://github.com/verl-project/verl/pull/5362",),
    ("verl", "micro_mean"): ("https://github.com/verl-project/verl/issues/5625",),
    ("torchtune", "step_sizes"): ("https://github.com/meta-pytorch/torchtune/pull/2745",),
}
# What follows from the meaning of a fault: with one process, the mean of a rank is the mean of all tokens; the
# first and the last of two micro-batches are both; only an epoch's end shows windows that do not fit into it.
MEANS_PROCESSES, MEANS_LEAST = "rank_mean", {"kept_first_and_last": 3}
HIDDEN = dict.fromkeys(("step_sizes", "rows_lost", "window_over_end", "ends_early"), "window_not_shown")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One audited configuration of one release, as in results/audit/."""

    subject: str
    versions: Mapping[str, str]  # the audited package first, without torch
    configuration: Configuration
    verdict: str
    fault: str = ""
    kinds: tuple[str, ...] = ()  # of the fault, also those that a dependency causes
    unsplit: tuple[str, ...] | None = None  # kinds if a step has one micro-batch; None if that was not run
    tokens: Sequence[Sequence[int]] = ()
    weights: Sequence[Sequence[float]] = ()
    loss_shows_it: bool | None = None
    remedy: str = ""  # in words
    reproducer: str = ""  # a file that was run and shows the fault
    changes: Configuration = field(default_factory=dict)  # of the remedy
    release: str = ""  # of the remedy
    reason: str = ""
    file: str = ""
    command: str = ""
    commit: str = ""
    by_bisection: bool = False  # only the verdict is known; the kinds are those of the releases with weights

    @property
    def package(self) -> str:
        return next(iter(self.versions), "")

    @property
    def version(self) -> str:
        return self.versions[self.package]

    @property
    def words_of_kinds(self) -> frozenset[str]:
        return frozenset(self.kinds) if self.verdict in FAULTY else frozenset()


@dataclass(frozen=True)
class Need:
    """A condition of a fault: the values of a key that were faulty, and those that were right."""

    key: str
    faulty: frozenset[Any]
    right: frozenset[Any] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A fault of a package's releases, under conditions."""

    subject: str
    package: str
    kinds: tuple[str, ...]
    needs: tuple[Need, ...]
    shown: tuple[Measurement, ...]  # faulty, by release
    bisected: tuple[Measurement, ...] = ()  # faulty, without weights
    right_releases: tuple[str, ...] = ()
    through: tuple[Measurement, ...] = ()  # faulty steps of other frameworks that use the package

    @cached_property
    def faulty(self) -> tuple[str, ...]:
        """Return the faulty releases that were run, the oldest first."""
        return tuple(sorted({m.version for m in (*self.shown, *self.bisected)}, key=numbers))

    @cached_property
    def right(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.right_releases), key=numbers))

    @property
    def links(self) -> tuple[str, ...]:
        return tuple(url for kind in self.kinds for url in UPSTREAM.get((self.package, kind), ()))

    @property
    def newer(self) -> tuple[str, ...]:
        """Return the right releases that are newer than all faulty ones."""
        return tuple(v for v in self.right if numbers(v) > numbers(self.faulty[-1]))

    @property
    def hidden(self) -> str:
        """Return the kind of the condition that no file shows, if the fault itself has one."""
        return HIDDEN.get(self.kinds[0], "") if {*self.kinds} <= HIDDEN.keys() else ""

    @cached_property
    def single(self) -> Mapping[int, tuple[str, ...]]:
        """Return the kinds of faults of steps with one micro-batch, by processes (2 stands for several)."""
        found = [m for m in self.shown if m.unsplit is not None]
        return {min(int(m.configuration.get("processes", 1)), 2): m.unsplit or () for m in found}

    @cached_property
    def least(self) -> int:
        """Return the micro-batches per step from which the fault occurs; 1 if the configured number does not
        matter, which a loop that sets the accumulation boundary itself does not use."""
        by_loop = any(need.key == BOUNDARY for need in self.needs)
        if by_loop or not self.single or any(set(self.kinds) & set(kinds) for kinds in self.single.values()):
            return 1
        return max((MEANS_LEAST.get(kind, 2) for kind in self.kinds), default=2)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def load() -> list[Measurement]:
    """Return all measurements that come with the package."""
    return parse(FILE.read_text(encoding="utf-8"))


def parse(text: str) -> list[Measurement]:
    rows: list[dict[str, Any]] = json.loads(text)["measurements"]
    for row in rows:
        row.update({key: tuple(row[key]) for key in ("kinds", "unsplit") if key in row})
    return [Measurement(**row) for row in rows]


@dataclass(frozen=True, kw_only=True)
class _Point:
    release: str
    configuration: Configuration
    kinds: frozenset[str]  # without those of dependencies; empty if the step was right
    of: Measurement


def faults(measurements: Sequence[Measurement]) -> tuple[Measured, ...]:
    """Return every fault that the measurements show, ordered by package and release."""
    seen = [m for m in measurements if m.verdict not in UNSEEN]
    found = [f for subject in dict.fromkeys(m.subject for m in seen) for f in _of_subject(subject, seen)]
    return tuple(sorted(found, key=lambda f: (f.package, numbers(f.faulty[-1]), f.kinds)))


def foreign(one: Measurement, measurements: Sequence[Measurement]) -> dict[str, frozenset[str]]:
    """Return the kinds of a fault that the same release of a dependency also has when it is audited, by package."""
    found = {}
    for name, version in list(one.versions.items())[1:]:
        theirs = [m for m in measurements if m.package == name and m.version == version]
        if shared := frozenset(one.kinds) & frozenset(k for m in theirs for k in m.words_of_kinds):
            found[name] = shared
    return found


def _of_subject(subject: str, seen: Sequence[Measurement]) -> Iterator[Measured]:
    points = list(_points(subject, seen))
    matters = {
        key for a in points if a.kinds for b in points if not b.kinds for key in _only_difference(a, b)
    }
    groups: dict[Any, dict[str, list[_Point]]] = {}
    for kinds, release in dict.fromkeys(
        (p.kinds, p.release) for p in points if p.kinds and not p.of.by_bisection
    ):
        faulty = [p for p in points if (p.kinds, p.release) == (kinds, release) and not p.of.by_bisection]
        fixed = frozenset((n.key, n.faulty) for n in _needs(faulty, points, matters))
        groups.setdefault((kinds, fixed), {})[release] = faulty
    for (kinds, _), by_release in groups.items():
        faulty = [p for found in by_release.values() for p in found]
        varied = [_needs(found, points, matters) + _unvaried(found, points) for found in by_release.values()]
        common = [n for n in varied[0] if all(any(n.key == m.key for m in needs) for needs in varied)]
        needs = [
            Need(
                n.key,
                n.faulty,
                frozenset(v for needs in varied for m in needs if m.key == n.key for v in m.right),
            )
            for n in common
        ]
        if kinds == {MEANS_PROCESSES}:
            needs.append(Need("processes", frozenset({2}), frozenset({1})))
        yield _measured(subject, faulty, needs, points, seen)


def _measured(
    subject: str, faulty: list[_Point], needs: list[Need], points: list[_Point], seen: Sequence[Measurement]
) -> Measured:
    kinds, package = faulty[0].kinds, faulty[0].of.package
    fits = [p for p in points if all(p.configuration.get(n.key) in n.faulty for n in needs)]
    bisected = [p for p in fits if p.kinds == kinds and p.of.by_bisection]
    wrong = {p.release for p in (*faulty, *bisected)}
    through = [
        m for m in seen if m.package != package and kinds <= foreign(m, seen).get(package, frozenset())
    ]
    return Measured(
        subject=subject,
        package=package,
        kinds=tuple(k for k in faulty[0].of.kinds if k in kinds),
        needs=tuple(needs),
        shown=tuple(p.of for p in sorted(faulty, key=lambda p: numbers(p.release))),
        bisected=tuple(p.of for p in bisected),
        right_releases=tuple(p.release for p in fits if not p.kinds and p.release not in wrong),
        through=tuple(through),
    )


def _points(subject: str, seen: Sequence[Measurement]) -> Iterator[_Point]:
    """Yield the audited steps of a subject, and those that were run to find a remedy, which were right."""
    mine = [m for m in seen if m.subject == subject and HIDES not in m.configuration]
    keys = dict.fromkeys(key for m in mine for key in m.configuration if key not in ROUNDING)
    for m in mine:
        defaults = {key: DEFAULT if KEYS[key].default is NOTHING else KEYS[key].default for key in keys}
        configuration = defaults | {key: value for key, value in m.configuration.items() if key in keys}
        away = frozenset(kind for kinds in foreign(m, seen).values() for kind in kinds)
        yield _Point(release=m.version, configuration=configuration, kinds=m.words_of_kinds - away, of=m)
        if m.changes or m.release:
            release = m.release or m.version
            yield _Point(
                release=release, configuration={**configuration, **m.changes}, kinds=frozenset(), of=m
            )


def _only_difference(a: _Point, b: _Point) -> list[str]:
    """Return the key if two steps of one release differ in a single one, else []."""
    different = [k for k in a.configuration if a.configuration[k] != b.configuration[k]]
    return different if a.release == b.release and len(different) == 1 else []


def _needs(faulty: list[_Point], points: list[_Point], matters: set[str]) -> list[Need]:
    """Return the conditions of one release's fault on the keys that can change a verdict."""
    needs = []
    for key in faulty[0].configuration:
        wrong = frozenset(p.configuration[key] for p in faulty)
        pairs = [b for a in faulty for b in points if not b.kinds and _only_difference(a, b) == [key]]
        right = frozenset(b.configuration[key] for b in pairs) - wrong
        default = KEYS[key].default
        asked = default is not NOTHING and default not in wrong
        if right or asked or (key in matters and default is NOTHING):
            needs.append(Need(key, wrong, right))
    return needs


def _unvaried(faulty: list[_Point], points: list[_Point]) -> list[Need]:
    """Return the conditions on keys of which this release was audited with one value, and others with several."""
    needs, release = [], faulty[0].release
    for key in faulty[0].configuration:
        everywhere = {p.configuration.get(key) for p in points}
        here = {p.configuration.get(key) for p in points if p.release == release}
        if len(here) == 1 < len(everywhere) and KEYS[key].default is NOTHING:
            needs.append(Need(key, frozenset(here)))
    return needs


MEASURED = faults(load())
