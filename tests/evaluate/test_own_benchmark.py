"""The user's own benchmarks: files and folders in the place of a pinned benchmark's id, with checkers, choices and
rewards as scorers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from truestep.api import compare
from truestep.cli.evaluation import with_default
from truestep.cli.main import _app
from truestep.errors import UserError
from truestep.evaluate.benchmarks import TABLE
from truestep.evaluate.estimate import mean_rewards
from truestep.evaluate.own import is_own, load_own
from truestep.evaluate.prompts import chosen, messages_of
from truestep.evaluate.run import write_samples
from truestep.model.load import load_tokenizer, resolve
from truestep.report.tables import score_table, terminal_table
from truestep.rundir import read_jsonl
from truestep.settings import ModelSettings

pytest.importorskip("torch")
SMALL = ["model.context_length=1024", "model.tiny.hidden_size=16", "model.tiny.num_layers=1",
         "model.tiny.num_heads=2", "max_new_tokens=12"]  # fmt: skip


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*words: str, code: int = 0) -> Any:
    sets = [word for pair in SMALL for word in ("--set", pair)]
    result = CliRunner().invoke(_app(), ["eval", "model", "tiny", "--json", *sets, *words])
    if isinstance(result.exception, UserError):
        assert code == 2, result.exception
        return str(result.exception)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_all_turns_of_a_problem_are_sent(tmp_path: Path) -> None:
    """A row's system turn replaces the template's; examples come after it, and only the last turn is wrapped."""
    (tmp_path / "mine.toml").write_text(OWN_PROMPTS)
    (exam,) = chosen(["mine.toml"], tmp_path)
    turns = [("system", "Be kind."), ("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], "answer": "4"}
    found = {}
    for name, rows in {"all": row, "last": {**row, "messages": row["messages"][-1:]}}.items():
        path = jsonl(tmp_path / f"{name}.jsonl", rows)
        ((benchmark, (found[name],)),) = load_own(f"x={path}", tmp_path, "auto")
        found[name, "content"] = benchmark.content
    sent = [(m.role, m.content) for m in messages_of(exam, found["all"], "math", 1)]
    shots = [("user", "Task: 3+3?"), ("assistant", "six")]
    assert sent == [turns[0], *shots, *turns[1:3], ("user", "Task: And 2+2?")]
    assert found["all", "content"] != found["last", "content"]
    sent = [(m.role, m.content) for m in messages_of(exam, found["last"], "math", 0)]
    assert sent == [("system", "Be brief."), ("user", "Task: And 2+2?")]


def test_what_is_a_path() -> None:
    assert not any(is_own(b.id) for b in TABLE)
    assert not is_own("aime2024")
    for entry in ("my.jsonl", "./folder", "data/x", "mine=x.csv", "."):
        assert is_own(entry), entry


def test_layouts_give_the_same_problems(tmp_path: Path) -> None:
    """The same two questions in six layouts have the same texts, answers and content hash."""
    plain = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]
    layouts = {
        "problem": plain,
        "question": [{"question": r["problem"], "answer": r["answer"]} for r in plain],
        "worked": [{"question": r["problem"], "answer": f"think #### {r['answer']}"} for r in plain],
        "messages": [
            {"messages": [{"role": "user", "content": r["problem"]}], "answer": r["answer"]} for r in plain
        ],
    }
    found = [
        load_own(str(jsonl(tmp_path / f"{n}.jsonl", *rows)), tmp_path, "auto") for n, rows in layouts.items()
    ]
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "answer"], *([r["problem"], r["answer"]] for r in plain)])
    found.append(load_own(f"mine={path.name}", tmp_path, "auto"))
    for [(benchmark, problems)] in found:
        assert [p.messages[-1].content for p in problems] == ["1+1?", "2+2?"]
        assert [p.answer.strip() for p in problems] == ["2", "4"]
        assert benchmark.content == found[0][0][0].content
        assert benchmark.kind == "math"
    assert [found[i][0][0].id for i in (0, -1)] == ["problem", "mine"]
    other = load_own(str(jsonl(tmp_path / "o.jsonl", {"problem": "1+1?", "answer": "3"})), tmp_path, "auto")
    assert other[0][0].content != found[0][0][0].content


def test_checkers_choices_and_folders(tmp_path: Path) -> None:
    rows = [{"problem": "a", "answer": "Paris", "checker": "exact"}, {"problem": "b", "answer": "2"}]
    jsonl(tmp_path / "mixed.jsonl", *rows)
    jsonl(tmp_path / "pick.jsonl", {"question": "q", "choices": ["x", "y"], "answer": "B"})
    (tmp_path / "notes.txt").write_text("not a benchmark")
    both = load_own(str(tmp_path), tmp_path, "auto")
    assert [b.id for b, _ in both] == ["mixed", "pick"]
    assert [p.checker for p in both[0][1]] == ["exact", "math"]
    assert (both[1][0].kind, both[1][0].scorer) == ("choice", "exact")
    assert "A) " in both[1][1][0].messages[-1].content
    assert both[1][1][0].answer in "AB"
    named = load_own(f"all={tmp_path}", tmp_path, "auto")
    assert [b.id for b, _ in named] == ["all-mixed", "all-pick"]
    forced = load_own("pick.jsonl", tmp_path, "choice")
    assert forced[0][1][0].checker == "choice"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"problem": "a"}], r"x\.jsonl:1: answer"),
        ([{"question": "a", "answer": ""}], r"x\.jsonl:1: answer: expected text"),
        ([{"problem": "a", "answer": "1", "checker": "mth"}], r'x\.jsonl:1: checker: .*did you mean "math"'),
        ([{"question": "a", "choices": ["x", "y"], "answer": "C"}], r"x\.jsonl:1: answer"),
        (
            [{"question": "a", "choices": ["x", "y"], "answer": "A"}, {"question": "b", "answer": "1"}],
            r"x\.jsonl:1: choices: some rows have choices and some have none",
        ),
        ([], r"x\.jsonl: expected one JSON object per line, got an empty file"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    jsonl(tmp_path / "x.jsonl", *rows)
    with pytest.raises(UserError, match=said):
        load_own("x.jsonl", tmp_path, "auto")


def test_bad_names_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "aime24.jsonl", {"problem": "a", "answer": "1"})
    with pytest.raises(UserError, match=r"name of a pinned benchmark; give it another: my-aime24="):
        load_own(str(path), tmp_path, "auto")
    with pytest.raises(UserError, match="no such file or folder: gone"):
        load_own("gone.jsonl", tmp_path, "auto")
    with pytest.raises(UserError, match=r"no such file or folder: .*24\.jsnl; did you mean"):
        load_own(f"{path.parent}/{path.stem}.jsnl", tmp_path, "auto")
    with pytest.raises(UserError, match='"a b" is not a name'):
        load_own(f"a b={path}", tmp_path, "auto")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder .* has no"):
        load_own("empty", tmp_path, "auto")
    words = ["--benchmark", f"one={path}", "--benchmark", f"./one={path}", "--dry-run"]
    assert "is not a name" in call(*words, code=2)
    copy = jsonl(tmp_path / "one.jsonl", {"problem": "a", "answer": "1"})
    words = ["--benchmark", f"one={path}", "--benchmark", str(copy), "--dry-run", "--prompts", "brief"]
    assert "are both called one" in call(*words, code=2)


REWARD = """
def words(samples):
    return [None if s.problem.columns["answer"] == "4" else float(len(s.completion.split())) for s in samples]
"""


def test_scored_resumed_compared_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole evaluation with the user's own reward: a sample that it cannot score does not count as zero, an interrupted
    evaluation ends with the same bytes, and the files work as those of a pinned benchmark."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{n}+{n}?", "answer": str(2 * n)} for n in range(4)]
    jsonl(tmp_path / "sums.jsonl", *rows)
    (tmp_path / "mine.py").write_text(REWARD)
    words = ["--benchmark", "sums.jsonl", "--samples", "2", "--prompts", "brief", "--few-shot", "1"]
    words += ["--scorer", "mine.py:words", "--scorer", "format", "--out", "out"]
    [score] = call(*words)["scores"]
    assert (score["data"], score["n"], score["whole"]) == ("sums", 8, True)
    kept = read_jsonl(tmp_path / "out/evaluations/brief/sums.samples.jsonl")[1:]
    expected = [len(r["completion"].split()) for r in kept if r["gold"] != "4"]
    assert [r["rewards"].get("words") for r in kept if r["gold"] == "4"] == [None, None]
    by_problem = np.array(expected, dtype=float).reshape(3, 2).mean(1)
    assert score["rewards"]["words"]["value"] == pytest.approx(by_problem.mean())
    assert score["rewards"]["words"]["stderr"] == pytest.approx(by_problem.std(ddof=1) / 3**0.5)
    assert score["rewards"]["words"]["missing"] == 2
    assert score["rewards"]["format"]["missing"] == 0
    assert "Mean words" in (tmp_path / "out/report.html").read_text()

    path = tmp_path / "out/evaluations/brief/sums.samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    call(*words, "--resume")
    assert path.read_bytes() == whole
    (tmp_path / "mine.py").write_text(REWARD + "# changed\n")
    assert "made with a different model, data, settings" in call(*words, "--resume", code=2)
    export = CliRunner().invoke(_app(), ["eval", "export", "out", "--out", "lm", "--json"])
    assert export.exit_code == 0, export.output
    told = json.loads((tmp_path / "lm/brief/results.json").read_text())
    assert told["results"]["sums"]["exact_match,none"] == score["score"]
    compared = CliRunner().invoke(_app(), ["eval", "compare", "out", "lm", "--json"])
    assert json.loads(compared.stdout)["comparisons"][0]["num_problems"] == 4


def test_columns_are_named_as_for_data(tmp_path: Path) -> None:
    """Named columns give the same problems; rows with unknown columns get the remedy; a name that is not used is refused."""
    rows = [{"q": "1+1?", "gold": "2", "question": "see q"}, {"q": "2+2?", "gold": "4", "question": "see q"}]
    free = jsonl(tmp_path / "free.jsonl", *rows)
    own, problems = load_own(str(free), tmp_path, "auto", {"problem": "q", "answer": "gold"})[0]
    plain = jsonl(tmp_path / "plain.jsonl", *({"problem": r["q"], "answer": r["gold"]} for r in rows))
    same, wanted = load_own(str(plain), tmp_path, "auto")[0]
    assert (own.content, [p.messages for p in problems]) == (same.content, [p.messages for p in wanted])
    choices = jsonl(
        tmp_path / "c.jsonl", *({"q": r["q"], "gold": "B", "opts": ["1", r["gold"]]} for r in rows)
    )
    names = {"problem": "q", "answer": "gold", "choices": "opts"}
    own, problems = load_own(str(choices), tmp_path, "auto", names)[0]
    assert (own.kind, [p.messages[-1].content.partition("\n")[0] for p in problems]) == (
        "choice",
        ["1+1?", "2+2?"],
    )
    with pytest.raises(UserError, match="pass --column OURS=THEIRS"):
        load_own(str(choices), tmp_path, "auto")
    bad = jsonl(tmp_path / "bad.jsonl", {"problem": "1?", "answer": ""})
    with pytest.raises(UserError) as caught:
        load_own(str(bad), tmp_path, "auto")
    assert "--column" not in str(caught.value), "its columns are known"
    for columns, fault in (
        ({"problem": "qq"}, 'did you mean "q"'),
        ({"problm": "q"}, 'did you mean "problem"'),
    ):
        with pytest.raises(UserError, match=fault):
            load_own(str(free), tmp_path, "auto", columns)
    sets = ["--set", "data.free.columns.problem=q", "--benchmark", str(free)]
    assert "does not use this setting; remove it; name the columns" in call(*sets, code=2)
    assert "no benchmark is a file of your own" in call(
        "--benchmarks", "gsm8k", "--column", "problem=q", code=2
    )
    assert "--column x is not OURS=THEIRS" in call("--benchmark", str(free), "--column", "x", code=2)


@pytest.mark.slow
def test_a_dry_run_refuses_what_a_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "sums.jsonl", {"problem": "1+1?", "answer": "2"})
    (tmp_path / "mine.py").write_text(REWARD)
    words = ["--benchmark", "sums.jsonl", "--scorer"]
    told = call(*words, "mine.py:word", "--dry-run", code=2)
    assert "cannot be loaded: word does not exist in" in told
    assert 'did you mean "words"' in told
    assert call(*words, "mine.py:words", "--dry-run")["total"]["samples"] == 1


def test_the_command_can_be_written_with_or_without_its_name() -> None:
    assert with_default(["eval", "runs/x"]) == ["eval", "model", "runs/x"]
    assert with_default(["eval", "model", "runs/x", "--json"]) == ["eval", "model", "runs/x", "--json"]
    assert with_default(["eval", "model", "--help"]) == ["eval", "model", "--help"]
    assert with_default(["eval", "model", "--limit", "1"]) == ["eval", "model", "model", "--limit", "1"]
    assert with_default(["eval", "model"]) == ["eval", "model", "model"], "a folder with this name"
    assert with_default(["eval", "--help"]) == ["eval", "--help"]
    assert with_default(["eval", "list"]) == ["eval", "list"]
    assert with_default(["run", "model", "x"]) == ["run", "model", "x"]
    assert "truestep eval model --help" in CliRunner().invoke(_app(), ["eval", "--help"]).stdout
    assert "pass --benchmarks gsm8k" in call("--tasks", "gsm8k", code=2)


def test_a_model_that_is_not_here_is_named_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such folder; did you mean .*runs/sft"):
        resolve(ModelSettings(path="runs/sfd"))
    assert resolve(ModelSettings(path="org/name")) == "org/name"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(
        UserError, match=r"no such folder \(beside .*\), and the hub http://127\.0\.0\.1:9 cannot be reached"
    ):
        load_tokenizer(ModelSettings(path="org/name"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"= 'org/name': no such folder \(beside .* from the hub: "):
        load_tokenizer(ModelSettings(path="org/name"))
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"= 'org/name' cannot be loaded: "):
        load_tokenizer(ModelSettings(path="org/name"))


def rewarded(folder: Path, values: list[list[float | None]]) -> Path:
    rows = [
        {"problem_id": f"p{p}", "sample_index": i, "prompt": f"{p}?", "verdict": "correct", "num_tokens": 1,
         "rewards": {} if value is None else {"brevity": value}}
        for p, of in enumerate(values) for i, value in enumerate(of)
    ]  # fmt: skip
    folder.mkdir()
    write_samples(folder / "sums.samples.jsonl", "sums", folder.name, rows)
    return folder


def test_scorers_are_compared_by_their_means(tmp_path: Path) -> None:
    """The verdicts are all the same, so a metric that is ignored gives a difference of 0."""
    a = rewarded(tmp_path / "a", [[1.0, 3.0], [5.0, 5.0], [None, 7.0], [None, None]])
    b = rewarded(tmp_path / "b", [[4.0, 4.0], [5.0, 9.0], [9.0, 10.0], [1.0, 1.0]])
    [found] = compare(a, b, metric="brevity")["comparisons"]
    differences = np.array([2.0, 2.0, 2.5])
    assert found["difference"] == pytest.approx(differences.mean())
    width = 4.302653 * differences.std(ddof=1) / 3**0.5  # Student's t with 2 degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx(
        (found["difference"] - width, found["difference"] + width)
    )
    assert (found["num_problems"], found["num_better"], found["a"]["unscored"]) == (3, 3, 3)
    assert (found["a"]["score"], found["b"]["score"]) == pytest.approx((14 / 3, (4 + 7 + 9.5 + 1) / 4))
    told = CliRunner().invoke(_app(), ["eval", "compare", str(a), str(b), "--metric", "brevity"]).stdout
    assert told.startswith("sums, mean brevity: 4.67 [")
    assert "(truestep, a, 3 samples without it) → 5.38 [" in told
    for metric in ("", "correct"):
        assert compare(a, b, metric=metric)["comparisons"][0]["difference"] == 0.0
    [same] = compare(a, a, metric="brevity")["comparisons"]
    assert (same["difference"], same["low"], same["p_value"]) == (0.0, None, None)
    assert (
        "[no interval]"
        in CliRunner().invoke(_app(), ["eval", "compare", str(a), str(a), "--metric", "brevity"]).stdout
    )
    with pytest.raises(UserError, match=r'no score brev; .* one of correct, brevity; did you mean "brevity"'):
        compare(a, b, metric="brev")


BROKEN = """
def fails(samples):
    raise ValueError("boom")

def some(samples):
    return [float("nan") if s.problem.answer == "4" else {"a": 1.0, "b": 2.0} for s in samples]
"""


def test_a_scorer_that_fails_is_named_with_its_first_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation ends with its verdicts; the table, the JSON and the page say how many samples have no value."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "sums.jsonl", *({"problem": f"{n}+{n}?", "answer": str(2 * n)} for n in range(4)))
    (tmp_path / "mine.py").write_text(BROKEN)
    words = [
        "--benchmark",
        "sums.jsonl",
        "--scorer",
        "mine.py:fails",
        "--scorer",
        "mine.py:some",
        "--out",
        "out",
    ]
    found = call(*words, "--samples", "1", "--set", "max_new_tokens=2")
    [score], place = found["scores"], f"({tmp_path}/mine.py, line 3, in fails)"
    assert (score["n"], score["unscored"]) == (4, 0)
    fails, some = score["rewards"]["fails"], score["rewards"]["some"]
    assert (fails["value"], fails["low"], fails["scored"], fails["missing"]) == (None, None, 0, 4)
    assert fails["first_missing"] == f"sums-1: ValueError: boom {place}"
    assert (some["value"], some["scored"], some["missing"]) == (3.0, 3, 1)
    assert ": returned nan" in some["first_missing"]
    warning, note = found["notes"][-2:]
    assert warning.startswith(
        "warning: sums · question: the scorer fails scored 0 of 4 samples; the first without"
    )
    assert note.startswith("sums · question: the scorer some scored 3 of 4 samples")
    page = (tmp_path / "out/report.html").read_text()
    assert "scorer fails scored 0 of 4" in page
    assert "– (4 samples without it)" in page
    told = str(terminal_table(score_table(tmp_path / "out"), width=300).caption)
    assert (
        f"mean fails, sums · question: – (4 samples without it; the first: sums-1: ValueError: boom {place})"
        in told
    )
    assert "some/a" not in told, "the parts are in the page"


def test_a_recipe_names_files_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    jsonl(tmp_path / "r/t.jsonl", {"problem": "1", "answer": "one"})
    recipe = tmp_path / "r/eval.toml"
    recipe.write_text(
        'benchmarks = ["t.jsonl"]\nchecker = "exact"\nlimit = 1\nprompts = ["brief"]\nmax_new_tokens = 8\n'
        '[model]\npath = "tiny"\ncontext_length = 1024\n'
    )
    result = CliRunner().invoke(_app(), ["eval", "model", str(recipe), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["jobs"][0]["data"] == "t"


def test_means_of_rewards() -> None:
    rows = [
        {"problem_id": p, "sample_index": i, "rewards": {"r": v} if v is not None else {}}
        for p, i, v in [("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 8.0), ("b", 1, None), ("c", 0, None)]
    ]
    found = mean_rewards(rows)["r"]
    assert found["value"] == 5.0
    assert found["stderr"] == pytest.approx(np.std([2.0, 8.0], ddof=1) / 2**0.5)
    assert (found["num_problems"], found["missing"]) == (2, 2)
    assert mean_rewards(rows[:2])["r"] | {"value": 0} == {
        "value": 0, "stderr": None, "low": None, "high": None, "num_problems": 1, "scored": 2, "missing": 0,
    }  # fmt: skip


OWN_PROMPTS = """
[[template]]
id = "exam"
system = "Be brief."
math = "Task: {problem}"
worked = [["3+3?", "six"], ["4+4?", "eight"]]
"""


def test_prompts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the model is asked what is in the file; a template of a file is sent as written, with its examples."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "sums.jsonl", {"problem": "1+1?", "answer": "2"})
    (tmp_path / "mine.toml").write_text(OWN_PROMPTS)
    words = [
        "--benchmark",
        "sums.jsonl",
        "--prompts",
        "question,mine.toml",
        "--few-shot",
        "1",
        "--out",
        "out",
    ]
    assert [row["prompt"] for row in call(*words)["scores"]] == ["question", "exam"]
    ((_, (problem,)),) = load_own("sums.jsonl", tmp_path, "auto")
    plain, exam = chosen(["question", "mine.toml"], tmp_path)
    assert [m.content for m in messages_of(plain, problem, "math", 0)] == ["1+1?"]
    for kind in ("math", "choice"):
        turns = [(m.role, m.content) for m in messages_of(exam, problem, kind, 1)]
        assert turns == [
            ("system", "Be brief."), ("user", "Task: 3+3?"), ("assistant", "six"), ("user", "Task: 1+1?")
        ]  # fmt: skip
    (tmp_path / "mine.toml").write_text(OWN_PROMPTS.replace("six", "6"))
    assert "made with a different model, data, settings" in call(*words, "--resume", code=2)
    (tmp_path / "mine.toml").write_text(OWN_PROMPTS.replace("Task", "Sum"))
    assert "made with a different model, data, settings" in call(*words, "--resume", code=2)
    [row] = call("--benchmark", "sums.jsonl", "--out", "bare")["scores"]
    assert row["prompt"] == "question"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", r"has no \[\[template\]\] table"),
        ("[[template]]\nid = 3", "template 1: id: expected a string"),
        ('[[template]]\nid = "plain"\nmath = "{problem}"', "template 1: id: expected a new name"),
        ('[[template]]\nid = "../x"\nmath = "{problem}"', "template 1: id: expected a new name"),
        ('[[template]]\nid = "a"\nmath = "Go"', "template 1: math: expected a text with {problem}"),
        ('[[template]]\nid = "a"', "template 1: math: expected a text with {problem}"),
        (
            '[[template]]\nid = "a"\nmath = "{problem}"\nchoice = "x"',
            "choice: expected a text with {problem}",
        ),
        (
            '[[template]]\nid = "a"\nmath = "{problem}"\nmaths = "x"',
            'maths: unknown key; did you mean "math"',
        ),
        ('[[template]]\nid = "a"\nmath = "{problem}"\nstop = "x"', "stop: expected a list of strings"),
        (
            '[[template]]\nid = "a"\nmath = "{problem}"\nworked = [["q"]]',
            r"worked: expected a list of \[question",
        ),
        ('[[template]]\nid = "a"\nmath = "{problem}"\nchat = 1', "chat: expected true or false"),
        (OWN_PROMPTS + OWN_PROMPTS.replace("Task", "Sum"), 'two different templates have the id "exam"'),
        (OWN_PROMPTS, "few_shot = 3: the template exam has 2 worked examples"),
        ("[[template", "is not valid TOML"),
    ],
)
def test_a_bad_file_of_prompts_is_named(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    row = str(jsonl(tmp_path / "b.jsonl", {"problem": "1", "answer": "1"}))
    ((_, (problem,)),) = load_own(row, tmp_path, "auto")

    def sent() -> None:
        for template in chosen(["mine.toml"], tmp_path):
            messages_of(template, problem, "math", 3)

    with pytest.raises(UserError, match=fault):
        sent()


def test_unknown_prompts_are_named(tmp_path: Path) -> None:
    (tmp_path / "exams.toml").write_text("")
    with pytest.raises(UserError, match=r'cannot read .*exam\.toml: .*; did you mean "exams\.toml"'):
        chosen([str(tmp_path / "exam.toml")])
    with pytest.raises(UserError, match=r"cannot read gone\.toml"):
        chosen(["gone.toml"])
    with pytest.raises(UserError, match=r'"plian" is not one of .*; did you mean "plain"'):
        chosen(["plian"])


@pytest.mark.parametrize(
    ("answers", "letters", "said"),
    [
        ([0, 2, 1], "ACB", "3 answers are read as the number of a choice, counted from 0"),
        ([1, 3, 2], "ACB", "3 answers are read as the number of a choice, counted from 1"),
        (["0", "z", "B"], "ACB", "1 answer is read as the number of a choice, counted from 0; 1 answer is read as the text"),
        (["A", "C", "B"], "ACB", ""),
        ([1, 2, 1], "answer: the answers of this file are numbers, which can count from 0 or from 1", ""),
        ([0, 3, 1], "which can count from 0 or from 1, because both", ""),
        ([0, 4, 1], r"x\.jsonl:2: answer: expected the number of one of the 3 choices \(0 to 2", ""),
        (["A", "F", "B"], r'x\.jsonl:2: answer: expected the label of one of the 3 choices \(A to C\), got "F"', ""),
        (["A", True, "B"], r"x\.jsonl:2: answer: expected text, got bool", ""),
    ],
)  # fmt: skip
def test_answers_are_letters_numbers_or_texts(
    tmp_path: Path, answers: list[Any], letters: str, said: str
) -> None:
    rows = [{"question": "q", "choices": ["x", "y", "z"], "answer": answer} for answer in answers]
    jsonl(tmp_path / "x.jsonl", *rows)
    if len(letters) > 3:
        with pytest.raises(UserError, match=letters):
            load_own("x.jsonl", tmp_path, "auto")
        return
    ((own, problems),) = load_own("x.jsonl", tmp_path, "auto")
    texts = [dict(zip("xyz", "ABC", strict=True))[_text_of(p.question, p.answer)] for p in problems]
    assert "".join(texts) == letters
    assert own.mind.startswith(said)
    assert bool(said) == bool(own.mind)


def _text_of(question: str, letter: str) -> str:
    return question.partition(f"{letter}) ")[2][0]


def test_numbers_that_are_labels_or_texts(tmp_path: Path) -> None:
    """Choices with numbers as labels keep them; a number that is the text of a different choice is refused."""
    jsonl(tmp_path / "a.jsonl", {"question": "q", "choices": ["1) x", "2) y"], "answer": 1})
    ((own, (problem,)),) = load_own("a.jsonl", tmp_path, "auto")
    assert (_text_of(problem.question, problem.answer), own.mind) == ("x", "")
    jsonl(tmp_path / "b.jsonl", {"question": "q", "choices": ["2", "1"], "answer": "2"})
    with pytest.raises(UserError, match="the text of choice A and can be the number of another"):
        load_own("b.jsonl", tmp_path, "auto")
    jsonl(tmp_path / "d.jsonl", {"question": "q", "choices": ["1", "0"], "answer": "1"})
    with pytest.raises(UserError, match="the text of choice A and can be the number of another"):
        load_own("d.jsonl", tmp_path, "auto")
    jsonl(tmp_path / "c.jsonl", {"question": "q", "choices": ["7", "9"], "answer": "9"})
    ((own, (problem,)),) = load_own("c.jsonl", tmp_path, "auto")
    assert _text_of(problem.question, problem.answer) == "9"


def test_a_named_column_applies_to_the_files_that_have_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "free.jsonl", {"q": "1+1?", "answer": "2"})
    jsonl(tmp_path / "mc.jsonl", {"question": "2?", "choices": ["x", "y"], "answer": "A"})
    both = ["free.jsonl", "mc.jsonl"]
    read = [load_own(file, tmp_path, "auto", {"problem": "q"}, both) for file in both]
    assert [problems[0].question[:2] for ((_, problems),) in read] == ["1+", "2?"]
    ((_, whole), (_, other)) = load_own(".", tmp_path, "auto", {"problem": "q"})
    assert [whole[0].question[:2], other[0].question[:2]] == ["1+", "2?"]
    with pytest.raises(
        UserError, match=r'none of the 2 files has the column that columns\.problem = "qu" names'
    ):
        load_own("free.jsonl", tmp_path, "auto", {"problem": "qu"}, both)
    with pytest.raises(UserError, match=r"free\.jsonl:1: qu: the row has no such column") as caught:
        load_own("mc=free.jsonl", tmp_path, "auto", {"problem": "qu"})
    assert "correct the row" not in str(caught.value)


def test_a_comparison_names_its_sides(tmp_path: Path) -> None:
    for run, checkpoint in (("x", "base"), ("x", "rl"), ("y", "base")):
        (tmp_path / run / "evaluations").mkdir(parents=True, exist_ok=True)
        rewarded(tmp_path / run / "evaluations" / checkpoint, [[1.0, 3.0], [5.0, 5.0]])

    def told(a: str, b: str) -> str:
        return CliRunner().invoke(_app(), ["eval", "compare", str(tmp_path / a), str(tmp_path / b)]).stdout

    assert "(truestep, x, base) → " in (said := told("x/evaluations/base", "y/evaluations/base"))
    assert "(truestep, y, base): " in said
    assert "(truestep, base) → " in (said := told("x/evaluations/base", "x/evaluations/rl"))
    assert "(truestep, rl): " in said
    assert told("y", "y").count("(truestep, base)") == 2
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare contains no .*pass a run directory"):
        compare(tmp_path / "bare", tmp_path / "y")
    (tmp_path / "bare/resolved.toml").touch()
    with pytest.raises(
        UserError, match=r"the run .*bare has no evaluation; run truestep eval .*bare --benchmark"
    ):
        compare(tmp_path / "bare", tmp_path / "y")
