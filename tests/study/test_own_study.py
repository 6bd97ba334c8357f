"""A new user's study, as docs/how-to/own-study.md describes it: from a file with faults to the table. The files
of the study are the blocks of the page."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import Children

from truestep.checkpoint.export import export_hf
from truestep.cli.main import main
from truestep.errors import UserError
from truestep.model.load import load_model
from truestep.report.study_tables import left_out
from truestep.settings import ModelSettings, TinySettings
from truestep.study.inputs import checked_study
from truestep.study.load import read_draft

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "own-study.md"
TINY = TinySettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
SUMS = [(a, b) for a in range(10) for b in range(10)]
random.Random(0).shuffle(SUMS)


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def chat(a: int, b: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"{a + b}"}]
    return {"messages": turns}


def problem(a: int, b: int) -> dict[str, Any]:
    return {"problem": f"{a}+{b}", "answer": f"{a + b}"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    cpu = torch.device("cpu")
    made = load_model(ModelSettings(path="tiny", tiny=TINY), dtype=torch.float32, device=cpu, seed=1)
    export_hf(folder / "model", made.model, made.tokenizer, card="mine")
    train, test = (json.loads(text) for text in blocks("json"))
    assert train == chat(2, 3)  # the rows are those of the page
    assert test == problem(4, 4)
    write_rows(folder / "train.jsonl", [chat(*s) for s in SUMS[:60]])
    write_rows(folder / "dev.jsonl", [problem(*s) for s in SUMS[60:70]])
    write_rows(folder / "test.jsonl", [problem(*s) for s in SUMS[70:82]])
    (folder / "reward.py").write_text(blocks("python")[0])
    (folder / "study.toml").write_text(blocks("toml")[0])
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "own"
    shutil.copytree(original, made)
    monkeypatch.chdir(made)
    return made


def call(monkeypatch: pytest.MonkeyPatch, words: str) -> int:
    monkeypatch.setattr(sys, "argv", words.partition("#")[0].split())
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def change(folder: Path, *changes: tuple[str, str]) -> None:
    text = (folder / "study.toml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    (folder / "study.toml").write_text(text)


def refused(folder: Path) -> list[str]:
    """Return the faults of the study."""
    with pytest.raises(UserError) as caught:
        checked_study(folder / "study.toml")
    first, *others = str(caught.value).removeprefix(f"{folder / 'study.toml'}: ").splitlines()
    return [line.strip() for line in others] or [first]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object, **named: object) -> None:
        raise AssertionError("something was started")

    for name in ("processes.start", "engines.start", "cell_runner.Runner.once"):
        monkeypatch.setattr(f"truestep.study.{name}", never)


@pytest.mark.usefixtures("no_training")
def test_the_first_refusal_of_the_page_is_word_for_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(
        folder,
        ('controls_off = "a first look at two arms"\n', ""),
        ("tokens_per_microbatch = 400", "tokens_per_microbatch = 4"),
    )
    write_rows(folder / "test.jsonl", [problem(*s) for s in SUMS[:12]])
    before = sorted(folder.rglob("*"))
    for command in blocks("sh")[0].splitlines():
        assert call(monkeypatch, command) == 2
        shown = capsys.readouterr().err.partition("error: ")[2]
        assert shown == blocks("text")[0].removeprefix("error: ")
    assert sorted(folder.rglob("*")) == before


def test_everything_that_is_missing_is_listed(folder: Path) -> None:
    """Faults of the file, of its stages, of the data, of the code and of the model come together."""
    change(
        folder,
        ("question", "qestion"),
        ('controls_off = "a first look at two arms"\n', ""),
        ('reference = "sft"', 'reference = "stf"'),
        ('"./model"', '"./modle"'),
        ('source = "test.jsonl"', 'source = "tset.jsonl"\nlimt = 3'),
        ("epochs = 4\n", ""),
        ("prompts_per_step = 4\n", ""),
        ('stages = ["sft", "rl"]', 'stages = ["sft", "rl", "more"]'),
    )
    write_rows(folder / "train.jsonl", [{"messages": []}])
    faults = refused(folder)
    for said in (
        'qestion: unknown key; did you mean "question"?',
        "the controls base, sft, ",
        "reference: 'stf' is not an arm",
        "arms.sft-rl: there is no [stages.more]",
        'run.data.test.limt: unknown key; did you mean "limit"?',
        "stages.sft: exactly one of epochs and steps",
        "train.jsonl:1: messages",
    ):
        assert any(said in fault for fault in faults), (said, faults)
    assert len(faults) == len(set(faults))


def test_faults_of_model_code_and_files_come_together(folder: Path) -> None:
    change(
        folder,
        ('"./model"', '"./modle"'),
        ("reward.py:right", "reward.py:rigth"),
        ('"dev.jsonl"', '"none.jsonl"'),
    )
    faults = refused(folder)
    assert len(faults) == 3, faults
    for said in ("model.path = './modle': no such folder", 'did you mean "right"?', "none.jsonl"):
        assert any(said in fault for fault in faults), (said, faults)


SAME = [
    problem(*SUMS[5]),
    {"problem": " {} +  {} ".format(*SUMS[3]), "answer": "0"},
    {"problem": "${}+{}$".format(*SUMS[2]), "answer": "0"},
]
NEAR = [
    {"problem": "{}+{}0".format(*SUMS[3]), "answer": "0"},
    {"problem": "what is {}+{}".format(*SUMS[3]), "answer": "0"},
    problem(*SUMS[75]),
]


def test_test_problems_in_other_sets_are_refused_by_their_content(folder: Path) -> None:
    """A copy of rows under a different name, in a different order, layout and spelling."""
    train = [chat(*s) for s in SUMS[:60]]
    train[5]["messages"][0]["content"] = "{}  + {} ".format(*SUMS[5])
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", [*NEAR, *SAME, problem(*SUMS[61])])
    faults = refused(folder)
    assert len(faults) == 2
    assert "data.test: 3 of 7 problems are also in data.train: " in faults[0]
    assert "test.jsonl:4 (" in faults[0]
    assert "train.jsonl:6; remove them" in faults[0]
    assert 'allow_overlap.test = "..."' in faults[0]
    assert "data.test: 1 of 7 problems are also in data.dev: " in faults[1]
    write_rows(folder / "test.jsonl", NEAR)
    checked_study(folder / "study.toml")


def test_an_overlap_is_allowed_with_a_reason(folder: Path) -> None:
    write_rows(folder / "test.jsonl", [problem(*SUMS[5]), problem(*SUMS[75])])
    change(folder, ("primary", 'allow_overlap = { test = "it measures memorization" }\nprimary'))
    study, inputs = checked_study(folder / "study.toml")
    assert inputs.prepared.overlap["pairs"][0]["exact"]["num_evaluation"] == 1
    (line,) = left_out({"controls_off": {}, "allow_overlap": study.allow_overlap})
    assert line == "test may have problems of training or dev sets: it measures memorization"


def test_problems_of_the_pinned_base_are_training_problems(folder: Path) -> None:
    change(folder, ('[run.model]\npath = "./model"\n', ""), ("primary", 'base = "base.toml"\nprimary'))
    stage = (folder / "study.toml").read_text().partition("[stages.sft]")[2].partition("[stages.rl]")[0]
    model = 'name = "base"\nmodel.path = "./model"\ndata.train.source = "first.jsonl"\n'
    (folder / "base.toml").write_text(f"{model}[[stages]]{stage}")
    write_rows(folder / "first.jsonl", [chat(*s) for s in SUMS[82:98]])
    checked_study(folder / "study.toml")
    write_rows(folder / "first.jsonl", [chat(*s) for s in SUMS[80:98]])
    (fault,) = refused(folder)
    assert "data.test: 2 of 12 problems are also in data.train of base.toml" in fault


def test_a_set_with_two_roles_is_refused_by_its_name(folder: Path) -> None:
    change(folder, ('data = ["test"]', 'data = ["train"]'))
    assert "data.train is used both for testing and for training; use a separate data set" in refused(folder)


REFUSED = [
    [
        ('controls_off = "a first look at two arms"', 'controls_off = " "', "a reason must not be empty"),
        ('data = ["test"]', 'benchmarks = ["test.jsonl"]', "run.evaluate.benchmarks: a study evaluates data sets"),
        ("[run.model]", "[resources]\ngpus = 64\n[run]\nseed = 3\n[run.model]", "resources.gpus: a cell"),
        ("epochs = 4", "epochs = 4\nmethod = 'row.py:mine'", "row.py does not exist"),
        ('kind = "rl"\ndata = "train"', 'kind = "rejection"\ndata = [{ name = "train" }]',
         "stages.rl.data: a rejection stage has one data set"),
        ("", "", "run.seed: the study sets it"),
    ],
    [
        ("max_new_tokens = 4", "max_new_tokens = 4000", "evaluate.sampling.max_new_tokens = 4000 does not fit"),
        ("sequences_per_step = 16", "sequences_per_step = 1600", "stages.sft.sequences_per_step = 1600 is more than"),
        ('stages = ["sft", "rl"]', 'stages = ["sft", "rl"]\nset = { "rl.prompts_per_step" = 400 }',
         "stages.rl.prompts_per_step = 400 is more than"),
    ],
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED, ids=["file", "data"])
def test_what_a_cell_would_refuse_is_refused_first(folder: Path, changes: list[tuple[str, str, str]]) -> None:
    change(folder, *((old, new) for old, new, _ in changes))
    faults = refused(folder)
    for _, _, said in changes:
        assert any(said in fault for fault in faults), (said, faults)


def test_one_reason_leaves_out_every_control_that_no_arm_is(folder: Path) -> None:
    change(folder, ('name = "sft"\n', 'name = "sft"\ncontrol = "sft"\n'))
    study, _ = checked_study(folder / "study.toml")
    assert set(study.controls_off) == {"base", "sft-continued", "rl-from-base", "random-reward", "rejection"}
    assert set(study.controls_off.values()) == {"a first look at two arms"}


def test_a_study_with_several_sets_ranks_and_own_code_is_accepted(folder: Path) -> None:
    sets = 'data = [{ name = "train", weight = 3 }, { name = "more" }]'
    (folder / "row.py").write_text(
        "from truestep.objective.methods.sft import sft\n\ndef mine():\n    return sft()\n"
    )
    write_rows(folder / "more.jsonl", [chat(*s) for s in SUMS[82:98]])
    held = 'validation = { data = "dev", every_steps = 1 }\nearly_stopping = { patience = 1 }'
    change(
        folder,
        ("[run.data.dev]", '[run.data.more]\nsource = "more.jsonl"\n[run.data.dev]'),
        ('source = "dev.jsonl"', 'source = "dev.jsonl"\ncolumns = { solution = "answer" }'),
        (
            'data = "train"\nepochs = 4',
            f'{sets}\nepochs = 4\nepochs_of = "train"\nmethod = "row.py:mine"\n{held}',
        ),
        ('data = "train"\nsteps', f"{sets}\nsteps"),
        ("[run.model]", "[resources]\nranks = 2\n[run.model]"),
    )
    text = (folder / "study.toml").read_text()
    again = text.partition("[stages.rl]")[0].partition("[stages.sft]")[2]
    arm = '[[arms]]\nname = "more"\nstages = ["sft", "again"]\nequal_flops = { to = "sft-rl", step_like = "sft" }\n'
    (folder / "study.toml").write_text(f"{text}\n[stages.again]{again}\n{arm}")
    study, inputs = checked_study(folder / "study.toml")
    assert inputs.stages == {"sft": ["sft"], "sft-rl": ["sft", "rl"], "more": ["sft", "again"]}
    draft = read_draft({**study.model_dump(mode="json", exclude_none=True)}, str(folder / "study.toml"))
    assert draft.faults.found == []


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the commands of the page, and return what they print."""
    for command in blocks("sh")[0].splitlines():
        assert call(monkeypatch, command) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    table = json.loads((folder / "out" / "results.json").read_text())
    assert table["complete"]
    assert [arm["seeds"] for arm in table["arms"]] == [[1, 2], [1, 2]]
    for text in (shown, (folder / "out/report.html").read_text(), (folder / "out/table.md").read_text()):
        words = " ".join(text.split())
        assert "random-reward, rejection were left out: a first look at two arms" in words
    return shown


@pytest.mark.parametrize("cells", ["made up", pytest.param("real", marks=pytest.mark.slow)])
def test_the_page_from_the_plan_to_the_table(
    cells: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cells == "made up":
        monkeypatch.setattr("truestep.study.engines.start", Children())
        monkeypatch.setattr("truestep.cli.study.trainer_verdict", lambda: "RIGHT")
    shown = finished(folder, monkeypatch, capsys)
    assert "4 cells and 0 trials" in shown
    assert "sft-rl − sft (primary)" in shown


@pytest.mark.slow
def test_a_study_on_two_ranks_with_a_module_of_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    package = folder / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.move(folder / "reward.py", package / "rewards.py")
    change(
        folder,
        ("reward.py:right", "mine.rewards:right"),
        ("[run.model]", "[resources]\nranks = 2\n[run.model]"),
    )
    shutil.copy(folder / "study.toml", folder / "other.toml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(
        tmp_path / "elsewhere"
    )  # modules are found next to the study, not in the current folder
    assert call(monkeypatch, f"truestep study {folder / 'study.toml'} --out {folder / 'out'}") == 0
    table = json.loads((folder / "out" / "results.json").read_text())
    assert table["complete"], table["failures"]
