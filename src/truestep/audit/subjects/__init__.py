"""What is audited: one adapter a framework, a script that runs in a child process (they import each other by bare
names), and the table of which script steps which framework, in which configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

CASES = ("ragged", "unsplit", "masked", "window")
ENGINE = ("ragged", "unsplit", "masked")  # an engine is fed by a loop: the end of an epoch is not its own
CLIP, CLIP_RATE = ("clipped",), ("clipped", "scheduled")
RELATED = ("clipped", "scheduled", "resumed")
NOT_SAVED = (("resumed", "its checkpoints are made by its command, which needs a GPU"),)
EPOCHS_SAVED = (("resumed", "its checkpoints hold whole epochs and weight files of its own"),)
OWN_LOOP = "only the loss is the framework's: clip, schedule and checkpoint are not"
FUNCTION = tuple((name, OWN_LOOP) for name in RELATED)
ADDRESSED = (
    ("scheduled", "its step is told its learning rate"),
    ("resumed", "held by its own tests of the run"),
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to use a framework. ``documented``: the option, away from its default, that changes the step on
    purpose; ``only``: the cases that make sense here; ``without``: relations that cannot be seen here, and
    why."""

    options: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1
    documented: str = ""
    only: tuple[str, ...] = CASES
    without: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a finding says of it."""
        return {**self.options, "processes": self.world_size}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``needs``: the distributions without which the script cannot run; the first one is what is audited."""

    name: str
    script: str
    needs: tuple[str, ...]
    configurations: Sequence[Configuration]
    brings: tuple[str, ...] = ()  # frameworks that come with it whether they are named or not


def _both(**options: Any) -> tuple[Configuration, Configuration]:
    """The same on one and on two processes, relations included."""
    one = Configuration(options=options, only=CASES + RELATED)
    return one, replace(one, world_size=2)


def _zero(stage: int, *, offload: bool, **options: Any) -> dict[str, Any]:
    return {"zero_stage": stage, "offload": offload, **options}


ARCHS = ("plain", "llama", "qwen2", "gemma3", "gpt2", "neox", "opt")
LLAMA = {"arch": "llama"}
TORCH = Subject(
    name="torch loop",
    script="torch_loop",
    needs=("torch",),
    configurations=[Configuration(only=CASES + RELATED)],
)
TABLE: tuple[Subject, ...] = (
    TORCH,
    Subject(
        name="torch DDP",
        script="ddp",
        needs=("torch",),
        configurations=[Configuration(world_size=2, only=CASES + RELATED)],
    ),
    Subject(
        name="torch FSDP2",
        script="fsdp2",
        needs=("torch",),
        configurations=[Configuration(world_size=2, only=CASES + RELATED)],
    ),
    Subject(
        name="truestep",
        script="truestep_step",
        needs=("truestep", "transformers", "torch"),
        configurations=[
            Configuration(options=LLAMA, only=ENGINE + CLIP, without=ADDRESSED),
            Configuration(options=LLAMA, world_size=2, only=ENGINE + CLIP, without=ADDRESSED),
            Configuration(
                options={**LLAMA, "parallel": "fsdp2"}, world_size=2, only=ENGINE + CLIP, without=ADDRESSED
            ),
        ],
    ),
    Subject(
        name="accelerate",
        script="accelerate_loop",
        needs=("accelerate", "torch"),
        configurations=[
            Configuration(only=ENGINE + RELATED),
            Configuration(world_size=2, only=ENGINE + RELATED),
        ],
    ),
    Subject(
        name="transformers Trainer",
        script="hf_trainer",
        needs=("transformers", "accelerate", "torch"),
        configurations=[
            *_both(**LLAMA),
            Configuration(options={"arch": "gpt2"}),
            Configuration(options={**LLAMA, "optimizer": "adamw"}),
            Configuration(
                options={**LLAMA, "average_tokens_across_devices": False},
                world_size=2,
                documented="average_tokens_across_devices = false",
            ),
        ],
    ),
    Subject(
        name="TRL SFTTrainer",
        script="trl_sft",
        needs=("trl", "transformers", "accelerate", "datasets", "torch"),
        configurations=[
            *_both(**LLAMA),
            Configuration(options={**LLAMA, "packing": True}, only=("ragged", "unsplit")),
            Configuration(options={**LLAMA, "assistant_only": True}, only=("chat",)),
        ],
    ),
    Subject(
        name="LLaMA-Factory",
        script="llamafactory_sft",
        needs=("llamafactory", "transformers", "accelerate", "torch"),
        brings=("trl",),
        configurations=[*_both(**LLAMA), Configuration(options={"arch": "gpt2"})],
    ),
    Subject(
        name="DeepSpeed",
        script="deepspeed_engine",
        needs=("deepspeed", "torch"),
        configurations=[
            Configuration(options={"stage": 2, "offload": True}, only=ENGINE + RELATED),
            Configuration(options={"stage": 2, "offload": True}, world_size=2, only=ENGINE + RELATED),
            Configuration(options={"stage": 2, "offload": True, "manual": True}, only=ENGINE + RELATED),
            Configuration(options={"stage": 2, "offload": False}, only=ENGINE + RELATED),
            Configuration(options={"stage": 1, "offload": True}, only=ENGINE + RELATED),
            Configuration(options={"stage": 3, "offload": True}, only=ENGINE + RELATED),
        ],
    ),
    Subject(
        name="OpenRLHF SFTTrainer",
        script="openrlhf_sft",
        needs=("openrlhf", "transformers", "torch"),
        brings=("deepspeed",),
        configurations=[
            Configuration(options={"offload": False, **LLAMA}, only=ENGINE + CLIP_RATE, without=NOT_SAVED),
            Configuration(
                options={"offload": False, **LLAMA}, world_size=2, only=ENGINE + CLIP_RATE, without=NOT_SAVED
            ),
            Configuration(options={"offload": True, **LLAMA}, only=ENGINE + CLIP_RATE, without=NOT_SAVED),
        ],
    ),
    Subject(
        name="torchtune SFT recipe",
        script="torchtune_sft",
        needs=("torchtune", "torch"),
        configurations=[Configuration(only=CASES + CLIP_RATE, without=EPOCHS_SAVED)],
    ),
    Subject(
        name="verl agg_loss (function level)",
        script="verl_agg_loss",
        needs=("verl", "torch"),
        configurations=[
            Configuration(only=ENGINE, without=FUNCTION),
            Configuration(world_size=2, only=ENGINE, without=FUNCTION),
        ],
    ),
    Subject(
        name="transformers Trainer + DeepSpeed",
        script="hf_trainer",
        needs=("transformers", "deepspeed", "accelerate", "torch"),
        configurations=[Configuration(options=_zero(2, offload=True, **LLAMA))],
    ),
    Subject(
        name="TRL SFTTrainer + DeepSpeed",
        script="trl_sft",
        needs=("trl", "deepspeed", "transformers", "accelerate", "datasets", "torch"),
        configurations=[
            Configuration(options=_zero(2, offload=True, assistant_only=True, **LLAMA), only=("chat",))
        ],
    ),
)


def applicable(installed: Mapping[str, str]) -> list[Subject]:
    """The subjects whose needs are all installed."""
    return [s for s in TABLE if all(name in installed for name in (*s.needs, *s.brings))]


def meant_by(names: Sequence[str]) -> list[Subject]:
    """The subjects that a requirement is about: all of the named packages are theirs, one of them is what is
    audited, and no framework comes in that was not named."""
    frameworks = {s.needs[0] for s in TABLE} - {"torch", "accelerate", "transformers"}
    return [
        s
        for s in TABLE
        if set(names) <= {*s.needs, *s.brings}
        and s.needs[0] in names
        and not (set(s.needs) & frameworks) - set(names)
    ]


def with_arch(subject: Subject, arch: str) -> Subject:
    """The same configurations on another model class; those that differ in nothing else become one.

    A configuration without a model class runs a tiny model of its own, and stays.
    """
    changed: list[Configuration] = []
    for c in subject.configurations:
        new = replace(c, options={**c.options, "arch": arch}) if "arch" in c.options else c
        if new not in changed:
            changed.append(new)
    return replace(subject, configurations=changed)
