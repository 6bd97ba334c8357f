"""docs/reference/ is what the code says; a key, an option or a field without a meaning or an example is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import reference
import reference_rows
import reference_settings

from truestep.cli.main import _app
from truestep.cli.settings import all_tables, find
from truestep.errors import UserError, _keys
from truestep.explained import Key, in_words
from truestep.settings import Settings

KEYS = [key for tables in all_tables().values() for table in tables for key in table.every_key]


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return reference.files()


def test_the_pages_are_up_to_date(pages: dict[Path, str]) -> None:
    old = [p.name for p, text in pages.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    assert old == [], "run benchmarks/reference.py"
    of_runs = {"architectures.md"}  # tests/e2e/test_architectures.py
    assert {p.name for p in reference.PAGES.iterdir()} == {p.name for p in pages} | of_runs


@pytest.mark.parametrize("key", sorted(set(_keys(Settings))))
def test_every_key_of_a_recipe_is_explained(key: str) -> None:
    assert all(found.meaning for found in find(key, KEYS))


GOOD = next(key for key in KEYS if key.path == "stages.NAME.optimizer.lr")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"meaning": ""}, "write its meaning"),
        ({"example": ""}, "write its meaning"),
        ({"example": "lr = "}, "is not TOML"),
        ({"example": "lr = 5"}, "is refused: example: stages.rl.optimizer.lr: .*less than or equal to 1"),
        ({"example": "eps = 1e-6"}, "its example sets eps"),
        ({"path": "stages.NAME.optimizer.rate", "example": "rate = 1"}, "unknown key"),
    ],
)
def test_a_key_without_a_meaning_or_a_valid_example_is_refused(change: dict[str, str], fault: str) -> None:
    reference_settings.check_example("recipe", ["[stages.optimizer]"], GOOD)
    with pytest.raises(reference.Incomplete, match=fault):
        reference_settings.check_example(
            "recipe", ["[stages.optimizer]"], dataclasses.replace(GOOD, **change)
        )


@pytest.mark.parametrize(
    "epilog", [None, "Example: truestep report", "Example: truestep report runs --nothing"]
)
def test_a_command_without_a_valid_example_is_refused(epilog: str | None) -> None:
    command = typer.main.get_command(_app()).commands["report"]  # type: ignore[attr-defined]
    reference.check_command(("report",), command)
    command.epilog = epilog
    with pytest.raises(reference.Incomplete, match="report"):
        reference.check_command(("report",), command)


def test_a_field_without_a_meaning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    about = next(one for one in reference_rows.NAMED["files"] if one["recorded"].endswith("timings.jsonl"))
    reference_rows.file_part(**about)
    for name, fault in (
        ("new_seconds", "write its meaning"),
        ("verdict", "the example and the fields differ"),
    ):
        shape = {**reference_rows.SHAPES[about["recorded"]], name: "number"}
        monkeypatch.setitem(reference_rows.SHAPES, about["recorded"], shape)
        with pytest.raises(reference.Incomplete, match=fault):
            reference_rows.file_part(**about)
        monkeypatch.undo()


def test_a_layout_needs_an_example_that_is_read_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference_rows.LAYOUTS, "Dolly", reference_rows.LAYOUTS["DeepMath"])
    with pytest.raises(reference.Incomplete, match="Dolly is read as DeepMath"):
        list(reference_rows.data_parts())
    monkeypatch.delitem(reference_rows.LAYOUTS, "Dolly")
    with pytest.raises(reference.Incomplete, match="layouts without an example"):
        list(reference_rows.data_parts())


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[int, Field(ge=1)] | Literal["all"], 'integer ≥ 1 or "all"'),
        (tuple[Literal["a", "b"], ...], 'list of some of "a", "b"'),
        (tuple[tuple[str, str], ...], "list of lists of 2 texts"),
        (bool | Literal["some"], 'true, false or "some"'),
        (dict[str, float | None], "table of NAME = number"),
        (Annotated[tuple[int, ...], Field(min_length=1)], "list of integers, at least 1 of them"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert in_words(annotation) == words


def test_a_table_with_other_defaults_than_its_keys_shows_them() -> None:
    (sampling,) = find("evaluate.sampling", KEYS)
    assert sampling.default == "{ temperature = 0.6, max_new_tokens = 256 }"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    _app()(args=["settings", *words], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["lr", "optimizer.lr", "stages.rl.optimizer.lr", "stages.warm.optimizer.lr", "learning_rate"]
)
def test_the_command_explains_a_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, name).splitlines() == [
        "stages.NAME.optimizer.lr: number > 0 and ≤ 1; must be set",
        f"  {GOOD.meaning}",
        "  Example:",
        "    [stages.optimizer]",
        "    lr = 1e-5",
    ]
    assert [Key(**one) for one in json.loads(said(capsys, name, "--json"))] == [GOOD]


def test_the_command_lists_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(said(capsys).splitlines()) == len(KEYS)


def test_an_unknown_key_gets_the_nearest_name() -> None:
    with pytest.raises(
        UserError, match=r'"optimizer.warmup" is not a setting; did you mean "warmup_fraction"'
    ):
        find("optimizer.warmup", KEYS)
    with pytest.raises(UserError, match="truestep settings lists all"):
        find("xyzzy", KEYS)
