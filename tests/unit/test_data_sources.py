"""Where problems come from: paths, folders, the hub and reasoning-gym; skip and limit; the real files where
given."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from truestep.data import gym, procedural
from truestep.data.files import files_of
from truestep.data.problems import load_problems
from truestep.errors import UserError
from truestep.records import Problem
from truestep.settings import DataSettings


def load(source: str, base_dir: Path = Path("/nonexistent"), **settings: Any) -> list[Problem]:
    needs = settings.pop("needs", ("answer",))
    return load_problems("d", DataSettings(source=source, **settings), seed=3, base_dir=base_dir, needs=needs)


def write(path: Path, num: int = 3, start: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"problem": f"{i}+0=?", "answer": i}) + "\n" for i in range(start, start + num))
    )
    return path


def answers(problems: list[Problem]) -> list[str]:
    return [p.answer for p in problems]


def test_a_relative_path_is_the_recipes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "recipe" / "a.jsonl", 1, start=10)
    write(tmp_path / "here" / "a.jsonl", 1, start=20)
    write(tmp_path / "here" / "b.jsonl", 1, start=30)
    monkeypatch.chdir(tmp_path / "here")
    assert answers(load("a.jsonl", tmp_path / "recipe")) == ["10"]
    assert answers(load("b.jsonl", tmp_path / "recipe")) == ["30"]


def test_skip_and_limit(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", 5))
    assert answers(load(path, skip=1, limit=2)) == ["1", "2"]
    assert answers(load(path, skip=3)) == ["3", "4"]
    assert answers(load(path, limit=5)) == answers(load(path))
    with pytest.raises(
        UserError, match=r'd\.limit = 5 .* the 3 rows .* after skip = 2; set limit = 3 or limit = "all'
    ):
        load(path, skip=2, limit=5)
    with pytest.raises(UserError, match=r"d\.skip = 5 leaves none of the 5 rows"):
        load(path, skip=5)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r'trian\.jsonl: no such file .*did you mean ".*/train\.jsonl"'):
        load("trian.jsonl", tmp_path)
    with pytest.raises(UserError, match=r'did you mean "procedural:'):
        load("procedual:addition")
    (tmp_path / "a.xlsx").write_text("problem,answer\n")
    with pytest.raises(UserError, match=r"a\.xlsx: expected a \.jsonl, .*\.parquet file.*, got \.xlsx"):
        load("a.xlsx", tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.jsonl: .*got an empty file"):
        load("empty.jsonl", tmp_path)
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    with pytest.raises(UserError, match=r"blank\.jsonl: expected at least one row"):
        load("blank.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"d\.options: a file has no options, got digits"):
        load("train.jsonl", tmp_path, options={"digits": 3})


def test_a_folder_is_its_files_or_those_of_its_split(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "b.jsonl", 2, start=2)
    pq.write_table(pa.table({"problem": ["x"], "answer": ["9"]}), tmp_path / "plain" / "a.parquet")
    (tmp_path / "plain" / "notes.txt").write_text("no data")
    problems = load("plain", tmp_path)
    assert answers(problems) == ["9", "2", "3"]
    assert [p.id for p in problems] == ["a-1", "b-1", "b-2"]
    write(tmp_path / "split" / "train-00000-of-00002.jsonl", 1, start=1)
    write(tmp_path / "split" / "train-00001-of-00002.jsonl", 1, start=2)
    write(tmp_path / "split" / "test.jsonl", 1, start=7)
    assert answers(load("split", tmp_path)) == ["1", "2"]
    assert answers(load("split", tmp_path, split="test")) == ["7"]
    with pytest.raises(UserError, match=r'no file for split "dev" .* has test, train'):
        load("split", tmp_path, split="dev")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: expected a \.jsonl, .* in this folder"):
        load("none", tmp_path)


TRAIN = ("train", "train_data", "train-b", "train_1", "gsm8k_train", "gsm8kTrain", "Train", "TRAIN", "my.train", "training",
         "train-00000-of-00002", "train/part", "Train/0")  # fmt: skip
TEST = ("test", "test_data", "test_2", "gsm8k-test", "MathTest", "x.test", "test/part", "testing")


@pytest.mark.parametrize(("train", "test"), [*((t, TEST[0]) for t in TRAIN), *((TRAIN[0], t) for t in TEST)])
def test_a_row_of_a_test_split_is_never_read_as_train(train: str, test: str, tmp_path: Path) -> None:
    write(tmp_path / f"{train}.jsonl", 1, start=1)
    write(tmp_path / f"{test}.jsonl", 1, start=7)
    assert answers(load(str(tmp_path))) == ["1"]
    assert answers(load(str(tmp_path), split="test")) == ["7"]
    (tmp_path / f"{train}.jsonl").unlink()
    with pytest.raises(UserError, match=r'no file for split "train" .*; this folder has test$'):
        load(str(tmp_path))


@pytest.mark.parametrize("other", ["contest", "latest", "trainer", "data", "validity"])
def test_words_that_only_contain_a_split_say_none(other: str, tmp_path: Path) -> None:
    write(tmp_path / f"{other}.jsonl", 1, start=1)
    write(tmp_path / "b.jsonl", 1, start=2)
    assert sorted(answers(load(str(tmp_path)))) == ["1", "2"]
    with pytest.raises(UserError, match=r'no file for split "test" .*; no name of a file says a split'):
        load(str(tmp_path), split="test")


def test_a_name_with_train_and_another_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train_test.jsonl", 1)
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"train_test\.jsonl: the name says test and train"):
            load(str(tmp_path), split=split)
    assert len(load(str(tmp_path / "train_test.jsonl"))) == 1
    write(tmp_path / "train_sft-00000-of-00001.jsonl", 1, start=5)
    assert answers(load(str(tmp_path), split="train_sft")) == ["5"]


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    def said(path: Path, **settings: Any) -> str:
        return files_of("d", DataSettings(source=str(path), **settings), Path())[2]

    write(tmp_path / "a" / "a.jsonl")
    assert said(tmp_path / "a") == said(tmp_path / "a" / "a.jsonl") == said(Path("procedural:addition")) == ""
    for name in ("b.csv", "d.json", "e.jsonl.gz", "sub/c.jsonl", "README.md", "F.JSONL"):
        write(tmp_path / "a" / name)
    found = said(tmp_path / "a")
    assert found.endswith("a.jsonl; not read: F.JSONL, b.csv, d.json, e.jsonl.gz, sub/c.jsonl")
    assert "no name says a split" in found
    for name in ("train.jsonl", "test.jsonl", "extra.jsonl"):
        write(tmp_path / "b" / name)
    assert said(tmp_path / "b").endswith(
        '(split "train"): read train.jsonl; not read: extra.jsonl, test.jsonl'
    )
    assert said(tmp_path / "b", split="test").endswith("read test.jsonl; not read: extra.jsonl, train.jsonl")
    write(tmp_path / "c" / "sub" / "x.jsonl")
    with pytest.raises(UserError, match=r"c: expected a \.jsonl.*, got none; it has sub/x\.jsonl"):
        load(str(tmp_path / "c"))


def test_default_ids_of_files_with_the_same_stem_differ(tmp_path: Path) -> None:
    write(tmp_path / "a" / "part.jsonl", 1)
    pq.write_table(pa.table({"problem": ["x"], "answer": ["9"]}), tmp_path / "a" / "part.parquet")
    assert [p.id for p in load(str(tmp_path / "a"))] == ["part.jsonl-1", "part.parquet-1"]
    for name in ("x/train/part", "x/training/part"):
        write(tmp_path / f"{name}.jsonl", 1)
    assert [p.id for p in load(str(tmp_path / "x"))] == ["train/part.jsonl-1", "training/part.jsonl-1"]


def test_ids_are_unique_over_all_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"problem": "x", "answer": 1, "id": "same"}\n')
    with pytest.raises(UserError, match=r'b\.jsonl:1: id: .*"same", which .*a\.jsonl:1 also has'):
        load(str(tmp_path))


def test_hub_rows_are_checked_as_file_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'hub:org/set".*pip install "truestep\[hub\]"'):
        load("hub:org/set")
    asked = []

    def load_dataset(
        path: str, config: str | None, split: str, trust_remote_code: bool
    ) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        if path == "org/absent":
            raise FileNotFoundError("offline, and not in the cache\nmore")
        return [{"problem": "x", "answer": "1"}, {"problem": "y", "answer": ""}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"^hub:org/set\[test\]:2: answer: "):
        load("hub:org/set", split="test", options={"config": "main"})
    assert asked == [("org/set", "main", "test")]
    with pytest.raises(UserError, match=r"org/absent.*cannot be loaded: offline, and not in the cache$"):
        load("hub:org/absent")
    with pytest.raises(UserError, match=r"options\.subset: a hub source has only the option config"):
        load("hub:org/set", options={"subset": "main"})


def test_hub_numbers_are_the_shortest_in_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(list[dict[str, Any]]):
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            super().__init__(rows)
            self.features = {
                name: types.SimpleNamespace(dtype=dtype)
                for name, dtype in (("problem", "string"), ("answer", "float32"))
            }

    def load_dataset(*asked: Any, **options: Any) -> Table:
        return Table([{"problem": "x", "answer": 0.10000000149011612}, {"problem": "y", "answer": 3.0}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert answers(load("hub:org/set")) == ["0.1", "3"]


def test_reasoning_gym_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r'pip install "truestep\[reasoning-gym\]"'):
        load("reasoning_gym:gcd", limit=3)
    with pytest.raises(UserError, match=r'no reasoning_gym task is called "lcn"; .*did you mean "lcm"'):
        load("reasoning_gym:lcn", limit=3)
    with pytest.raises(UserError, match=r"set limit = N"):
        load("reasoning_gym:gcd")
    with pytest.raises(UserError, match=r"no worked solutions"):
        load("reasoning_gym:gcd", limit=3, needs=("solution",))


def test_reasoning_gym_golds_are_confirmed_by_our_own_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(task: str, seed: int, size: int, wrong: int = -1) -> list[dict[str, str]]:
        assert task == "chain_sum"
        return [
            {"question": f"Work out: 4 - 1 + {i} =", "answer": str(3 + i + (i == wrong))} for i in range(size)
        ]

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    sets = {
        split: load("reasoning_gym:chain_sum", split=split, limit=20) for split in ("train", "dev", "test")
    }
    texts = {split: {p.messages[0].content for p in problems} for split, problems in sets.items()}
    assert all(len(t) == 20 for t in texts.values())
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]
    first = int(sets["train"][0].answer) - 3
    with pytest.raises(UserError, match=rf"its answer to .* is {4 + first}, but ours is {3 + first}"):
        load("reasoning_gym:chain_sum", limit=20, options={"wrong": first})
    with pytest.raises(UserError, match=r"reasoning_gym:chain_sum options: .*colour"):
        load("reasoning_gym:chain_sum", limit=20, options={"colour": 1})


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("chain_sum", "State the final answer to the following arithmetic problem: 4 - 1 - -7 =", 10),
        ("products", "Solve the following multiplication: 18271 * 43432. Give only the result.", 793546072),
        ("products", "Solve: 2 * -3 * 4.", -24),
        (
            "gcd",
            "Find the Greatest Common Divisor (GCD) of these numbers: 780, 460, 40. Give only the GCD.",
            20,
        ),
        ("lcm", "Find the Least Common Multiple (LCM) of these numbers: 98, 58", 2842),
    ],
)
def test_own_answers_to_gym_questions(task: str, question: str, answer: int) -> None:
    assert gym.TASKS[task](question) == answer


@pytest.mark.parametrize("task", gym.TASKS)
def test_the_installed_reasoning_gym_agrees(task: str) -> None:
    pytest.importorskip("reasoning_gym", reason="the optional package reasoning-gym is not installed")
    problems = load(f"reasoning_gym:{task}", limit=50, split="test")
    assert len({p.id for p in problems}) == 50
    assert all(procedural.split_of(p.messages[0].content) == "test" for p in problems)


def real_files() -> list[Path]:
    folder = os.environ.get("TRUESTEP_DATA")
    return (
        []
        if not folder
        else sorted([*Path(folder).glob("benchmarks/*.jsonl"), *Path(folder).glob("gsm8k/train.jsonl")])
    )


@pytest.mark.skipif(not real_files(), reason="TRUESTEP_DATA does not name a folder of real data")
def test_real_files_load_whole() -> None:
    for path in real_files():
        num_lines = sum(1 for line in path.open("rb") if line.strip())
        assert len(load(str(path))) == num_lines, path
