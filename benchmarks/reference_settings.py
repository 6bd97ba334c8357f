"""The page docs/reference/settings.md: every key of recipes and studies, with an example that the reader accepts."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from reference_rows import Incomplete, page, prose, table

from truestep.cli.settings import all_tables
from truestep.errors import UserError
from truestep.explained import Key, Table
from truestep.pipeline.paper_plan import read_declared
from truestep.pipeline.prepare import check_methods
from truestep.settings import parse_settings
from truestep.study.load import parse_study

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """name = "sums"
model = { path = "tiny" }
data.train = { source = "procedural:addition", limit = 500 }
data.test = { source = "procedural:addition", split = "test", limit = 100 }
evaluate = { data = ["test"] }

[[stages]]
kind = "sft"
data = "train"
steps = 60
sequences_per_step = 16
tokens_per_microbatch = 4096
optimizer = { lr = 1e-3 }

[[stages]]
kind = "rl"
data = "train"
steps = 20
prompts_per_step = 8
tokens_per_microbatch = 8192
optimizer = { lr = 1e-4 }
sampling = { max_new_tokens = 32 }
"""
# What an example is set beside, so that a key that needs another one can be tried.
BESIDE = """
[declared]
config = "c.json"
formula_parameters = 1e6
rows = { train = 500 }
prompt_tokens = 1
max_prompt_tokens = 1
demonstration_tokens = 1
max_demonstration_tokens = 1
stages.rl = {}
"""
COMMON = """
dev = { data = "held", every_steps = 10 }
validation = { data = "held", every_steps = 10 }
optimizer = { lr = 1e-3, weight_decay = 0 }
tokens_per_microbatch = 512
"""
STAGES = (
    'kind = "sft"\ndata = "train"\nsteps = 9\nsequences_per_step = 4',
    'kind = "sft"\ndata = [{ name = "train" }, { name = "more" }]\nepochs = 2\nepochs_of = "train"\nsequences_per_step = 4',
    'kind = "sft"\ndata = "train"\nsteps = 9\nsequences_per_step = 4\nlora = { rank = 8 }',
    'kind = "rejection"\ndata = "train"\nsteps = 9\nsequences_per_step = 4\nsampling = { max_new_tokens = 9 }',
    'kind = "rejection"\ndata = "train"\nepochs = 1\nsequences_per_step = 4\nsampling = { max_new_tokens = 9 }',
    'kind = "rl"\ndata = "train"\nsteps = 9\nprompts_per_step = 4\nsampling = { max_new_tokens = 9 }\n'
    'rewards = [{ function = "format" }]\nmethod_options = { correction = "truncate" }',
)
EVALUATIONS = ('data = ["test"]', 'benchmarks = ["math500"]\nscorers = [{ function = "format" }]')
STUDY = """
name = "s"
question = "?"
seeds = [1, 2, 3]
reference = "b"
tuning = { data = "held" }
may_differ = ["sft.steps"]
controls_off = { sft-continued = "-", rl-from-base = "-", random-reward = "-", rejection = "-" }
run.model.path = "tiny"
run.evaluate.data = ["test"]
run.data.train = { source = "procedural:addition", seed = 0, limit = 50 }
run.data.held = { source = "procedural:addition", seed = 0, split = "dev", limit = 50 }
run.data.test = { source = "procedural:addition", seed = 0, split = "test", limit = 50 }
resources.stages.sft.ranks = 1

[stages.sft]
kind = "sft"
data = "train"
steps = 9
sequences_per_step = 4
tokens_per_microbatch = 512
optimizer.lr = 1e-3

[[arms]]
name = "c"
stages = ["sft"]
control = "sft"
equal_flops = { to = "b", step_like = "sft" }

[[arms]]
name = "a"
control = "base"

[[arms]]
name = "b"
stages = ["sft"]
"""


def surroundings(kind: str) -> Iterator[dict[str, Any]]:
    """Yield complete files in which an example of that kind of file can stand."""
    if kind == "study":
        made = tomllib.loads(STUDY)
        for number in range(3):
            yield {**deepcopy(made), "arms": made["arms"][number:] + made["arms"][:number]}
        return
    base = tomllib.loads(RECIPE) | tomllib.loads(BESIDE)
    base["data"] |= {"held": base["data"]["test"], "more": base["data"]["train"]}
    base.setdefault("compute", {})["gradient_checkpointing"] = True
    for stage in STAGES:
        for evaluation in EVALUATIONS:
            stages = [tomllib.loads(COMMON) | tomllib.loads(stage)]
            yield deepcopy({**base, "stages": stages, "evaluate": tomllib.loads(evaluation)})


def accepts(kind: str, raw: dict[str, Any]) -> None:
    """Raise UserError if the program does not accept a file."""
    if kind == "study":
        parse_study(raw, "example")
        return
    settings = parse_settings(raw, where="example")
    read_declared(settings, "example")
    check_methods(settings, ROOT)


def place(raw: Any, header: str) -> dict[str, Any] | None:
    """Return the table of a header, such as [data.NAME] or [[stages]] with kind = "rl", or None without one."""
    name, _, kind = header.partition(" with kind = ")
    for part in name.strip("[]").split(".") if name else ():
        found = next(iter(raw.values())) if part == "NAME" else raw.setdefault(part, {})
        raw = found[0] if isinstance(found, list) and found else found
        if not isinstance(raw, dict):
            return None
    return raw if not kind or raw.get("kind") == kind.strip('"') else None


def merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        old = into.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            merge(old, value)
        else:
            into[key] = value


def check_example(kind: str, headers: Iterable[str], key: Key) -> None:
    """Raise Incomplete if a key has no meaning, or no example that is accepted and sets the key."""
    if not (key.meaning and key.example):
        raise Incomplete(f"{key.path}: write its meaning and an example below the field")
    try:
        given = tomllib.loads(key.example)
    except tomllib.TOMLDecodeError as error:
        raise Incomplete(f"{key.path}: {key.example} is not TOML: {error}") from None
    if list(given) != [key.name]:
        raise Incomplete(f"{key.path}: its example sets {', '.join(given)}")
    reason = "no table has this key"
    for header in headers:
        for raw in surroundings(kind):
            if (at := place(raw, header)) is None:
                continue
            merge(at, given)
            try:
                accepts(kind, raw)
            except UserError as error:
                reason = str(error)
            else:
                return
    raise Incomplete(f"{key.path}: its example {key.example} is refused: {reason}")


def settings_page() -> str:
    parts = [
        "A recipe is a TOML file for `truestep run`, and a study is one for `truestep study`. Unknown keys are errors. A "
        "heading below is the header of a table in TOML; a key can also be written inside the table above it, as in this "
        "complete recipe:",
        f"```toml\n{RECIPE}```",
        "On the command line, `--set stages.sft.optimizer.lr=1e-4` overrides a key: a stage is called by its name, by "
        "default its kind. `truestep settings KEY` prints what this page says about a key.",
    ]
    for kind, found in all_tables().items():
        for one in found:
            parts += _settings_section(kind, one)
    return page("Settings", *parts)


def _settings_section(kind: str, one: Table) -> list[str]:
    for key in one.keys:
        check_example(kind, one.places, key)
    title = " and ".join(f"`{h}`" for h in one.places if h) or f"The top of a {kind}"
    title = re.sub(r" with kind = (\S+)`", r"` with `kind = \1`", title)
    rows = [(f"`{key.name}`", _type(key), key.meaning, f"`{key.example}`") for key in one.keys]
    return [f"## {title}", prose(one.about), table(("key", "type and default", "meaning", "example"), rows)]


def _type(key: Key) -> str:
    """Return the type and the default of a key."""
    kind = re.sub(r"(\^\S+\$)", r"`\1`", key.type)  # a pattern
    if not key.default:
        return f"{kind}; **required**"
    is_value = key.default[0] in '["{' or " " not in key.default
    return f"{kind}; default{f' `{key.default}`' if is_value else f': {key.default}'}"
