"""``truestep guard``: exit codes, damaged, cut and resumed logs, and the fields of its JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import logs
import pytest

from truestep.cli.main import main
from truestep.guard.log import SCHEMA as WRITTEN
from truestep.guard.log import Log
from truestep.guard.runs import FIELDS, NAME, SCHEMA, read

FAULT = {"verdict": "FAULT", "codes": ["kept"], "fault": "the intermediate micro-batches are dropped"}
END = {"schema": 1, "kind": "end", "steps": 40, "finished": True}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["truestep", "guard", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.mark.parametrize(("fault", "code"), [("", 0), ("mean of means", 1), ("dropped", 1)])
def test_a_real_run(tmp_path: Path, call: Any, fault: str, code: int) -> None:
    logs.train(tmp_path / "log.jsonl", fault)
    found, out, _ = call(tmp_path / "log.jsonl")
    assert found == code
    assert "3 of 4" in out
    assert ("FAULT" in out) == bool(code)
    assert {"": "", "mean of means": "mean of micro-batch means", "dropped": "intermediate"}[fault] in out
    assert ("step 1:" in out) == bool(code)


def test_a_run_that_was_not_judged_is_neither_right_nor_wrong(tmp_path: Path, call: Any) -> None:
    path = logs.write(tmp_path / "log.jsonl", logs.header(), logs.step(verdict="NOT OBSERVABLE"), END)
    assert call(path)[0] == 4
    assert call(logs.write(path, logs.header(), logs.step(), END))[0] == 0
    off = {"schema": 1, "kind": "off", "step": 0, "why": "no optimizer was given"}
    code, out, _ = call(logs.write(path, off))
    assert code == 4
    assert "no optimizer was given" in " ".join(out.split())


def test_an_output_folder_stands_for_its_log(tmp_path: Path, call: Any) -> None:
    logs.write(tmp_path / NAME, logs.header(), logs.step(), END)
    assert call(tmp_path)[0] == 0


def test_the_document(tmp_path: Path, call: Any) -> None:
    path = logs.write(
        tmp_path / "log.jsonl", logs.header(), logs.step(1, notes=["everything is multiplied by 0.51 (a clip)"]),
        logs.step(2, notes=["everything is multiplied by 0.73 (a clip)"]), logs.step(23, **FAULT), logs.step(43, **FAULT),
        END, logs.header(),
    )  # fmt: skip
    code, out, _ = call(path, "--json")
    assert code == 1
    document = json.loads(out)
    assert set(document) == {"schema", "verdict", "runs"}
    assert document["verdict"] == "FAULT"
    first, second = document["runs"]
    assert set(first) == {
        "run", "verdict", "header", "steps", "steps_watched", "faulty_steps", "first_fault", "notes", "off", "finished",
        "cut_line", "seconds",
    }  # fmt: skip
    assert (first["steps"], first["steps_watched"], first["faulty_steps"]) == (40, 4, 2)
    assert first["first_fault"]["step"] == 23
    assert first["header"]["model"] == "Qwen3ForCausalLM"
    assert first["notes"] == [
        {"text": "everything is multiplied by 0.51 (a clip)", "first_step": 1, "steps": 2}
    ]
    assert first["seconds"] == pytest.approx(4 * 0.0123)
    assert (first["finished"], second["finished"]) == (True, False)
    assert (second["verdict"], second["first_fault"]) == ("NOT OBSERVABLE", None)


def test_a_line_that_a_kill_has_cut(tmp_path: Path, call: Any) -> None:
    path = logs.write(tmp_path / "log.jsonl", logs.header(), logs.step())
    whole = path.read_text()
    for cut in ('{"schema": 1, "kind": "st', "{", '{"schema": 1, "kind": "end", "steps": 4'):
        path.write_text(whole + cut)
        code, out, _ = call(path)
        assert code == 0
        assert "line 3 of the log is unfinished" in " ".join(out.split())


def test_a_resumed_run_after_a_kill(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "log.jsonl"
    logs.train(path, close=False)
    with path.open("a") as file:
        file.write('{"schema": 1, "kind": "st')
    before = path.read_text()
    logs.train(path, "mean of means")
    assert path.read_text().startswith(before)
    first, second = read(path)
    assert (first.verdict, second.verdict) == ("RIGHT", "FAULT")
    assert (first.cut, second.cut) == (before.count("\n") + 1, 0)
    assert first.end is None
    assert second.header is not None
    assert call(path)[0] == 1


def one_line(path: Path, call: Any) -> str:
    code, out, err = call(path)
    assert code == 2
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert err.splitlines()[-1] == said[0]
    return said[0]


DAMAGED: list[tuple[str, dict[str, Any]]] = [
    ("schema", {"schema": 2}), ("kind", {"kind": "stop"}), ("step", {"step": "1"}), ("step", {"step": -1}),
    ("step", {"step": True}), ("verdict", {"verdict": "OK"}), ("fault", {"fault": None}), ("codes", {"codes": "kept"}),
    ("notes", {"notes": [1]}), ("weights", {"weights": [1.0]}), ("weights", {"weights": [["1"]]}),
    ("tokens", {"tokens": {}}), ("seconds", {"seconds": "1"}), ("residual", {"residual": 1e301}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "damage"), DAMAGED, ids=str)
def test_a_damaged_field_is_named_with_its_line(
    tmp_path: Path, call: Any, field: str, damage: dict[str, Any]
) -> None:
    path = logs.write(tmp_path / "log.jsonl", logs.header(), logs.step(1), {**logs.step(2), **damage}, END)
    assert f"log.jsonl:3: {field}: " in one_line(path, call)


@pytest.mark.parametrize("name", [name for name, (_, is_needed) in FIELDS["step"].items() if is_needed])
def test_a_missing_field_is_named(tmp_path: Path, call: Any, name: str) -> None:
    record = logs.step()
    del record[name]
    assert f":2: {name}: the field is missing" in one_line(
        logs.write(tmp_path / "l", logs.header(), record), call
    )


@pytest.mark.parametrize("line", ["weights", "[1]", "3", "[" * 100_000, '{"schema": 1, "step": NaN}', "\x00"])
def test_a_line_that_is_not_a_record(tmp_path: Path, call: Any, line: str) -> None:
    path = logs.write(tmp_path / "log.jsonl", logs.header())
    path.write_text(path.read_text() + line + "\n" + json.dumps(logs.step()) + "\n")
    assert "log.jsonl:2: " in one_line(path, call)


def test_bytes_that_are_not_text(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        json.dumps(logs.header()).encode() + b"\n\xff\xfe\x00\n" + json.dumps(logs.step()).encode() + b"\n"
    )
    assert "log.jsonl:2: " in one_line(path, call)


def test_a_file_that_is_missing_empty_or_a_folder(tmp_path: Path, call: Any) -> None:
    assert "none.jsonl does not exist" in one_line(tmp_path / "none.jsonl", call)
    assert f"{NAME} does not exist" in one_line(tmp_path, call)
    (tmp_path / "empty").write_text("\n")
    assert "empty has no record of a guard" in one_line(tmp_path / "empty", call)


def test_hostile_text_does_not_control_the_terminal(tmp_path: Path, call: Any) -> None:
    code, out, err = call(logs.hostile(tmp_path / "log.jsonl"))
    assert code == 1
    assert not set(out + err) & {"\x1b", "\u202e"}
    assert "⟨U+001B⟩" in out


def test_the_table_of_many_ranks_is_short(tmp_path: Path, call: Any) -> None:
    code, out, _ = call(logs.large(tmp_path / "log.jsonl"))
    assert code == 1
    assert len(out.splitlines()) < 50
    assert "step 2003:" in out
    assert "and 4 more ranks" in out


def test_reading_a_log_needs_no_torch(tmp_path: Path) -> None:
    path = logs.write(tmp_path / "log.jsonl", logs.header(), logs.step(), END)
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\nfrom truestep.cli.main import main\n"
        f"sys.argv = ['truestep', 'guard', {str(path)!r}, '--html', {str(tmp_path / 'page.html')!r}]\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").is_file()


def test_every_field_that_is_checked_is_written(tmp_path: Path) -> None:
    logs.train(tmp_path / "log.jsonl")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in records] == ["run", "step", "step", "step", "end"]
    for one in records:
        assert set(FIELDS[one["kind"]]) <= set(one)
    assert SCHEMA == WRITTEN
    assert set(records[0]) == set(logs.header())
    assert set(records[1]) == set(logs.step())


def test_the_header_says_what_is_watched(tmp_path: Path) -> None:
    watch = logs.train(tmp_path / "a.jsonl", every=7, accumulation=0)
    header = read(tmp_path / "a.jsonl")[0].header
    assert header is not None
    assert header["watched"] == [one.name for one in watch.watched]
    assert header["parameters"] == sum(p.numel() for p in watch.model.parameters())
    assert (header["every"], header["ranks"], header["model"]) == (7, 1, "ToyModel")
    told = "; ".join(header["unseen"])
    assert "not checked: the number of micro-batches, the clip, the learning rate" in told
    logs.train(tmp_path / "b.jsonl", max_grad_norm=1e9, rate=lambda step: 1e-2)
    assert "not declared" not in "; ".join(read(tmp_path / "b.jsonl")[0].header["unseen"])  # type: ignore[index]


def test_a_log_that_cannot_be_written_does_not_turn_the_guard_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the other ranks would wait for this one."""

    def full(self: Log, path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "_append", full)
    watch = logs.train(tmp_path / "log.jsonl")
    assert watch.failure == ""
    assert [one["verdict"] for one in watch.records] == ["RIGHT"] * 3
    assert capsys.readouterr().err.count("cannot be written") == 1
