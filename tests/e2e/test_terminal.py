"""What files, ids, paths and arguments contain must not control the terminal of the person who looks at them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from truestep.cli.main import main
from truestep.cli.output import PlainConsole, plain

COMMAND = "\x1b]0;title\x07\x1b[31m\x9b2J"
NAME = f"{COMMAND}\u202e"  # of a file
EVIL = f"{NAME}\udcff"  # an argument with a byte that is not UTF-8


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["truestep", *words])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    return out + err


def control_characters(text: str) -> set[str]:
    return {c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files whose names, ids, texts and fields are escape sequences."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / NAME
    place.mkdir()
    rows = [{"id": f"{NAME}{n}", "problem": NAME, "answer": NAME, "solution": NAME} for n in range(2)]
    (place / f"{NAME}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (place / "twice.jsonl").write_text("".join(json.dumps({**r, "id": NAME}) + "\n" for r in rows))
    (place / f"{NAME}.toml").write_text(f'"{json.dumps(NAME)[1:-1]}" = 1\n'.replace("\\u009b", ""))
    (place / "pairs.jsonl").write_text(json.dumps({"id": NAME, "gold": NAME, "pred": NAME}) + "\n")
    results = {
        "results": {NAME: {"alias": NAME, "exact_match,none": 1.0}},
        "configs": {NAME: {"task": NAME}},
        "n-samples": {},
    }
    (place / "results_1.json").write_text(json.dumps(results))
    (place / "config.json").write_text(
        json.dumps({NAME: 1, "gradient_accumulation_steps": NAME, "mixed_precision": NAME})
    )
    (place / "run").mkdir()
    (place / "run" / "summary.json").write_text(json.dumps({
        "name": NAME, "kind": "evaluation", "model": NAME, "engine": NAME, "seeds": {}, "spread": [], "averages": [],
        "notes": [NAME], "status": "done", "scores": [],
    }))  # fmt: skip
    return place


COMMANDS = [
    ("run", "{0}.toml"), ("run", "{0}.none"), ("run", EVIL), ("run", "{0}.toml", "--set", EVIL),
    ("run", "{0}.toml", "--set", f"x={EVIL}"), ("sft", "{0}.toml"), ("study", "{0}.toml"), ("study", EVIL),
    ("data", "check", "{0}.jsonl"), ("data", "check", "{0}.jsonl", "--json"),
    ("data", "check", "twice.jsonl"), ("data", "show", "{0}.toml"), ("eval", "grade", "pairs.jsonl"),
    ("eval", "grade", "{0}.none"), ("eval", "grade", "{0}.jsonl"), ("eval", "tiny", "--benchmarks", EVIL),
    ("eval", EVIL, "--benchmarks", "math500", "--dry-run"),
    ("eval", "tiny", "--engine", EVIL, "--benchmarks", "math500"),
    ("eval", "import", ".", "--out", "{0}-out"), ("eval", "compare", "run", EVIL),
    ("eval", "export", "run", "--out", "{0}-out"), ("report", "run"), ("report", EVIL), ("report", "."),
    ("audit", EVIL), ("audit", "--python", EVIL), ("audit", "--config", "config.json", "--dry-run"),
    ("audit", "past", "."), ("audit", f"{EVIL}.py:f"), ("method", "check", EVIL), (EVIL,),
    (f"--{COMMAND}",), ("run", f"--{COMMAND}"), ("run", "a", COMMAND), ("data", EVIL),
    ("report", "--out", EVIL),
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=[f"{n}-{words[0][:6]!a}" for n, words in enumerate(COMMANDS)])
def test_no_command_prints_a_control_character(
    words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shown = run(capsys, monkeypatch, *(word.replace("{0}", NAME) for word in words))
    assert shown
    assert control_characters(shown) == set()


def test_text_in_tables_is_neither_markup_nor_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=f"[red]t[/blue]{EVIL}")
    table.add_column("[bold]h")
    table.add_row(f"[/x]c{EVIL}")
    PlainConsole(width=200).print(table)
    shown = capsys.readouterr().out
    assert control_characters(shown) == set()
    assert all(text in shown for text in ("[red]t[/blue]", "[bold]h", "[/x]c"))


def test_styles_of_ones_own_stay() -> None:
    from rich.text import Text

    console = PlainConsole(force_terminal=True, color_system="standard", no_color=False)
    with console.capture() as captured:
        console.print(Text("a\x1b[32mb", "red"))
    assert "\x1b[31m" in captured.get()
    assert "\x1b[32m" not in captured.get()


def test_readable_text_stays_as_it_is() -> None:
    text = "Größe √2 ≤ 3 漢字 emoji 🙂 é\n\ttab"
    assert plain(text) == text


def test_small_sizes_and_times_are_not_zero() -> None:
    from truestep.cli.progress import in_words, size_in_words

    assert [size_in_words(n) for n in (2**30 * 1.5, 2**20 * 3)] == ["1.5 GiB", "3.0 MiB"]
    assert [in_words(s) for s in (7200, 600, 36)] == ["2.0 h", "10 min", "36 s"]
