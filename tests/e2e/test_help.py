"""``--help`` of every command: each option says what it does and its default; examples of ``--set`` are real keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from truestep.cli.main import _app
from truestep.errors import _keys
from truestep.evaluate.jobs import SHORT
from truestep.settings import Settings

ROOT = typer.main.get_command(_app())


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from commands(command, (*path, name))


COMMANDS = dict(commands())
LEAVES = {path: command for path, command in COMMANDS.items() if not hasattr(command, "commands")}
by_name = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


def rendered(path: tuple[str, ...]) -> str:
    """The help page as one line, whatever its width."""
    done = CliRunner().invoke(_app(), [*path, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_walk_finds_every_command() -> None:
    assert {("run",), ("sft",), ("rl",), ("study",), ("audit",), ("report",)} <= set(LEAVES)
    assert {("data", "check"), ("data", "show"), ("eval", "model"), ("eval", "grade")} <= set(LEAVES)


@by_name
def test_every_option_says_what_it_does(path: tuple[str, ...]) -> None:
    page = rendered(path)
    assert COMMANDS[path].help
    for parameter in COMMANDS[path].params:
        text = " ".join((parameter.help or "").split())
        assert len(text) >= 12, f"{' '.join(path)} {parameter.name}: no help"
        assert text in page or getattr(parameter, "hidden", False)


def shown_default(parameter: Any) -> str | None:
    """What the page has to say: a default that is a value, or the words that stand for none."""
    if isinstance(parameter.show_default, str):
        return f"[default: ({parameter.show_default})"
    if parameter.default in (None, "", False, [], ()) or parameter.required:
        return None
    if parameter.default is True:
        return f"[default: {parameter.opts[0].removeprefix('--')}"
    return f"[default: {parameter.default}"


@by_name
def test_every_default_is_shown(path: tuple[str, ...]) -> None:
    page = rendered(path)
    for parameter in COMMANDS[path].params:
        wanted = shown_default(parameter)
        assert wanted is None or wanted in page, f"{' '.join(path)} {parameter.name}: {wanted} is not shown"
        if parameter.help and "default" in parameter.help:
            assert "[default" not in parameter.help, "the default belongs into show_default"


def test_some_defaults_are_checked() -> None:
    found = [w for command in LEAVES.values() for p in command.params if (w := shown_default(p))]
    assert "[default: (runs/NAME-HASH)" in found
    assert "[default: 180.0" in found
    assert "[default: gold" in found


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_examples_of_set_are_keys_of_that_command(path: tuple[str, ...]) -> None:
    """ "seed=1" in the help of --set: a key of the settings that this command reads."""
    command = LEAVES[path]
    texts = [p.help for p in command.params if "--set" in p.opts]
    examples = [key for text in texts for key in re.findall(r"([a-z_A-Z][\w.]*)=", text)]
    examples += re.findall(r"--set ([\w.]+)=", command.help or "")
    assert not texts or examples, "--set without an example"
    known = {*_keys(Settings), *(SHORT if path == ("eval", "model") else ())}
    assert set(examples) <= known, f"not a setting of {' '.join(path)}: {set(examples) - known}"


FIRST_LINE = {
    "run": ("run", "recipe.toml", "--dry-run", "--json"),
    "data show": ("data", "show", "recipe.toml", "--json"),
    "eval": ("eval", "tiny", "--benchmarks", "gsm8k", "--data", "nowhere", "--dry-run", "--json"),
    "study": ("study", "none.toml", "--json"),
    "audit": ("audit", "--dry-run", "--only", "accelerate", "--json"),
    "report": ("report", "."),
}
RECIPE = """
name = "first"
model = { path = "tiny" }
data.train = { source = "procedural:addition", limit = 2 }
"""


@pytest.mark.parametrize("words", FIRST_LINE.values(), ids=FIRST_LINE)
def test_a_command_says_first_what_it_does(words: tuple[str, ...], tmp_path: Path) -> None:
    """On stderr, before torch is imported; stdout stays one JSON document, or empty after an error."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    code = """
import builtins, sys
from truestep.cli.main import main
class Watched:
    def write(self, text):
        sys.__stderr__.write(("late " if "torch" in sys.modules else "soon ") + text if text.strip() else text)
        return len(text)
    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)
sys.stderr = Watched()
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"soon truestep {words[0]}"), done.stderr
    assert done.stdout == "" or done.stdout.lstrip().startswith("{")


def test_other_ranks_do_not_repeat_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "truestep", "study", "none.toml"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "RANK": "1"}, timeout=120,
    )  # fmt: skip
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("error")]
