"""A whole evaluation of the built-in model: files, resume, prompts, private benchmarks, the page, export and
import."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from truestep.cli.evaluation_actions import opened
from truestep.cli.main import _app
from truestep.errors import UserError
from truestep.evaluate import benchmarks, prompts
from truestep.evaluate.benchmarks import Benchmark
from truestep.evaluate.external_logs import read_evaluations, write_lm_eval
from truestep.evaluate.files import sealed
from truestep.evaluate.import_compare import compare_evaluations
from truestep.evaluate.jobs import changed, evaluation_settings
from truestep.evaluate.model_adapters import TokenAdapter
from truestep.evaluate.run import RunningScore
from truestep.evaluate.sources import content_hash, file_items
from truestep.evaluate.suite import averages
from truestep.model.load import load_tokenizer
from truestep.pipeline.prepare import prepare
from truestep.report.evaluation import write_evaluation_report
from truestep.report.html import write_report
from truestep.report.tables import ScoreRow, print_scores, score_table
from truestep.rundir import to_toml
from truestep.settings import ModelSettings, load_settings, read_recipe

pytest.importorskip("torch")
SECRET = "zebra"
RESULTS = Path(__file__).resolve().parents[2] / "results"


def add(
    folder: Path, monkeypatch: pytest.MonkeyPatch, id: str, rows: list[dict[str, Any]], **more: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{id}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = Benchmark(
        id=id, title=id, num_rows=len(rows), content=content_hash(file_items(path)), hub="", prompt="plain"
    )
    made = replace(base, max_new_tokens=16, **more)
    monkeypatch.setitem(benchmarks.BY_ID, id, made)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``truestep eval tiny …`` on made-up benchmarks."""
    data = tmp_path / "data"
    add(
        data,
        monkeypatch,
        "sums",
        [{"id": f"s{i}", "problem": f"{i}+1=?", "answer": str(i + 1)} for i in range(5)],
        samples=3,
    )
    rows = [
        {"id": f"g{i}", "question": f"{SECRET} {i}?", "choices": [f"{SECRET}1", "b", "c"], "answer": "A"}
        for i in range(3)
    ]
    add(data, monkeypatch, "hidden", rows, kind="choice", scorer="exact", private=True)

    def call(*words: str) -> Any:
        fixed = ["eval", "model", "tiny", "--data", str(data), "--json", "--set", "model.context_length=1024"]
        small = [
            "--set",
            "model.tiny.hidden_size=16",
            "--set",
            "model.tiny.num_layers=1",
            "--set",
            "model.tiny.num_heads=2",
        ]
        result = CliRunner().invoke(_app(), [*fixed, *small, *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


def rewritten(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the samples in a file and write them as truestep would."""
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k != "checksum"} for row in rows]
    change(rows)
    written = [header, *(sealed(row, header["identity"]) for row in rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "evaluations").rglob("*.json*"))
    }


def test_an_evaluation_from_command_to_page(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--benchmarks", "sums,hidden", "--prompts", "plain,odd-bare", "--out", str(out)]
    summary = run(*words)
    assert [(s["data"], s["prompt"]) for s in summary["scores"]] == [
        ("sums", "plain"), ("sums", "odd-bare"), ("hidden", "plain"), ("hidden", "odd-bare"),
    ]  # fmt: skip
    sums = summary["scores"][0]
    assert sums["n"] == 15 == sums["correct"] + sums["incorrect"] + sums["unscored"]
    assert set(sums["pass_at"]) == {"1", "2", "3"}
    assert set(sums["majority_at"]) == {"2", "3"}
    assert sums["strict_score"] is not None
    assert {s["benchmark"]: s["num_prompts"] for s in summary["spread"]} == {"sums": 2, "hidden": 2}
    assert all(row["to"] == "odd-bare" for s in summary["spread"] for row in s["against_first"])
    whole = files(out)
    samples = out / "evaluations" / "plain" / "sums.samples.jsonl"
    samples.write_bytes(b"".join(samples.read_bytes().splitlines(keepends=True)[:6]) + b'{"torn')
    assert run(*words, "--resume")["scores"] == summary["scores"]
    assert files(out) == whole
    page = (out / "report.html").read_text()
    assert "filter-0-incorrect" in page
    assert "<script" not in page


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_breaks_no_name_and_no_interval(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    (score,) = run("--benchmarks", "sums")["scores"]
    score |= {"data": "arc_challenge", "prompt": "odd-polite", "whole": False, "n": 200, "num_problems": 200}
    score |= {"score": 0.25, "low": 0.154, "high": 0.373, "strict_score": 1.0, "extracted_rate": 1.0}
    monkeypatch.setenv("COLUMNS", str(width))
    known = ScoreRow.__dataclass_fields__
    print_scores([ScoreRow(**{k: v for k, v in score.items() if k in known})], "run")
    shown = capsys.readouterr().out
    for text in ("arc_challenge", "odd-polite", "25.0 %", "[15.4, 37.3]", "100.0 %", "200 × 1"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown


@pytest.mark.parametrize(
    ("words", "samples"),
    [
        ([], {"sums": 6, "hidden": 3}),
        (["--benchmarks", "hidden"], {"hidden": 3}),
        (["--limit", "1"], {"sums": 3, "hidden": 1}),
    ],
)
def test_the_command_line_goes_before_a_recipes_limits(
    run: Callable[..., Any], tmp_path: Path, words: list[str], samples: dict[str, int]
) -> None:
    del run
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'benchmarks = ["sums", "hidden"]\nlimit = 3\n[limits]\nsums = 2\n[model]\npath = "tiny"\ncontext_length = 512\n'
    )
    fixed = ["eval", "model", str(recipe), "--data", str(tmp_path / "data"), "--dry-run", "--json"]
    result = CliRunner().invoke(_app(), [*fixed, *words], catch_exceptions=False)
    assert {job["data"]: job["samples"] for job in json.loads(result.stdout)["jobs"]} == samples


def test_the_running_score_ends_with_all_samples() -> None:
    running = RunningScore()
    notes = []
    for done, verdict in enumerate(("correct", "incorrect"), start=1):
        running.add({"problem_id": verdict, "verdict": verdict})
        notes.append(running.text(last=done == 2))
    assert [note.split(" [")[0] for note in notes] == ["score 100.0 %", "score 50.0 %"]


def test_a_private_benchmark_is_written_nowhere(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--benchmarks", "hidden", "--out", str(out))
    CliRunner().invoke(
        _app(), ["eval", "export", str(out), "--out", str(out / "exported")], catch_exceptions=False
    )
    written = [p for p in out.rglob("*") if p.is_file()]
    assert any("exported" in str(p) for p in written)
    assert not any(SECRET.encode() in p.read_bytes() for p in written)
    rows = [
        json.loads(line)
        for line in (out / "evaluations/plain/hidden.samples.jsonl").read_text().splitlines()[1:]
    ]
    assert {frozenset(row) for row in rows} == {
        frozenset(
            {
                "problem_id",
                "sample_index",
                "verdict",
                "strict",
                "lenient",
                "unreadable",
                "extracted",
                "stop",
                "num_tokens",
                "checksum",
            }
        )
    }
    assert all(isinstance(row["extracted"], bool) for row in rows)


def test_our_samples_come_back_from_lm_evals_layout(run: Callable[..., Any], tmp_path: Path) -> None:
    out, exported = tmp_path / "out", tmp_path / "exported"
    run("--benchmarks", "sums", "--samples", "1", "--out", str(out))
    CliRunner().invoke(_app(), ["eval", "export", str(out), "--out", str(exported)], catch_exceptions=False)
    (found,) = compare_evaluations(out, exported)["comparisons"]
    assert (found["a"]["made_by"], found["b"]["made_by"], found["difference"]) == ("truestep", "lm-eval", 0.0)
    results = json.loads((exported / "plain" / "results.json").read_text())
    assert results["results"]["sums"]["exact_match,none"] == found["a"]["score"]
    own, foreign = (read_evaluations(p)[0].rows for p in (out, exported))
    assert [r["verdict"] for r in own] == [r["verdict"] for r in foreign]
    assert [r["extracted"] for r in own] == [r["extracted"] for r in foreign]


def test_several_samples_come_back_from_lm_evals_layout(run: Callable[..., Any], tmp_path: Path) -> None:
    out, exported = tmp_path / "out", tmp_path / "exported"
    run("--benchmarks", "sums", "--out", str(out))
    path = out / "evaluations" / "plain" / "sums.samples.jsonl"
    rewritten(path, lambda rows: rows[0].update(verdict="correct"))  # a third of the first problem
    CliRunner().invoke(_app(), ["eval", "export", str(out), "--out", str(exported)], catch_exceptions=False)
    (found,) = compare_evaluations(out, exported)["comparisons"]
    assert found["difference"] == 0.0
    assert found["b"]["n"] == 15
    own, foreign = (read_evaluations(p)[0].rows for p in (out, exported))
    assert [(r["verdict"], r["completion"]) for r in own] == [
        (r["verdict"], r["completion"]) for r in foreign
    ]


def test_a_run_grows_and_never_loses_a_sample(run: Callable[..., Any], tmp_path: Path) -> None:
    out, at_once = tmp_path / "out", tmp_path / "at-once"
    run("--benchmarks", "sums", "--limit", "2", "--samples", "1", "--out", str(out))
    kept = files(out)["evaluations/plain/sums.samples.jsonl"].splitlines()
    run("--benchmarks", "sums", "--limit", "4", "--out", str(out), "--resume")
    run("--benchmarks", "sums", "--limit", "4", "--out", str(at_once))
    assert files(out) == files(at_once)
    assert set(kept) <= set(files(out)["evaluations/plain/sums.samples.jsonl"].splitlines())
    before = files(out) | {"resolved": (out / "resolved.toml").read_bytes()}
    for words, message in (
        (("--limit", "3"), "can only grow"),
        (("--set", "max_new_tokens=8"), r"a different evaluate.sampling.max_new_tokens"),
        (("--set", "temperature=0.9"), r"a different evaluate.sampling.temperature"),
        (("--few-shot", "1"), r"a different evaluate.few_shot"),
        (("--engine", "http://127.0.0.1:9/v1"), r"a different evaluate.engine"),
    ):
        with pytest.raises(UserError, match=message):
            run("--benchmarks", "sums", "--limit", "4", "--out", str(out), "--resume", *words)
        assert files(out) | {"resolved": (out / "resolved.toml").read_bytes()} == before


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


# What happens to a samples file (its lines, and those of the other model's file), and what the error says.
CONFUSED: dict[str, tuple[Callable[[list[str], list[str]], list[str]], str]] = {
    "twice, another lost": (lambda own, other: [*own[:-1], own[1]], "occurs twice; run the same command"),
    "twice": (lambda own, other: [*own, own[2]], "occurs twice; run the same command"),
    "another model's": (lambda own, other: other, "has samples of identity .* next to it are of .*; restore"),
    "another model's header": (lambda own, other: [other[0], *own[1:]], "has samples of identity"),
    "another model's behind": (
        lambda own, other: [*own, *other],
        "the sample is damaged|problem_id is missing",
    ),
    "one of another model": (lambda own, other: [*own[:-1], other[-1]], "the sample is damaged"),
    "one lost": (lambda own, other: own[:-1], r"has \d+ samples, but \d+ were made"),
}


@pytest.mark.parametrize(
    "name", [*[*CONFUSED][:2], *(pytest.param(one, marks=pytest.mark.slow) for one in [*CONFUSED][2:])]
)
def test_every_reader_refuses_samples_that_are_not_those_of_the_results(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run("--benchmarks", "sums", "--out", str(out))
    run("--benchmarks", "sums", "--out", str(other), "--set", "seed=1")
    change, words = CONFUSED[name]
    paths = [folder / "evaluations/plain/sums.samples.jsonl" for folder in (out, other)]
    kept = lines_of(paths[0])
    for command in (
        ("compare", str(other), str(out)),
        ("export", str(out), "--out", str(tmp_path / "exported")),
    ):
        assert CliRunner().invoke(_app(), ["eval", *command]).exit_code == 0
    shutil.rmtree(tmp_path / "exported")
    paths[0].write_text("".join(change(*map(lines_of, paths))))
    readers = [
        lambda: compare_evaluations(other, out),
        lambda: compare_evaluations(paths[1], paths[0]),
        lambda: write_lm_eval(out, tmp_path / "exported"),
        lambda: write_evaluation_report(out),
    ]
    if name != "one lost":  # a run's page is also written while samples are made
        readers.append(lambda: write_report(out))
    for read in readers:
        with pytest.raises(UserError, match=words):
            read()
    assert not (tmp_path / "exported").exists()
    if "restore" in words or "header" in name:
        paths[0].unlink()
    run("--benchmarks", "sums", "--out", str(out), "--resume")
    assert lines_of(paths[0]) == kept


@pytest.mark.parametrize(
    "content",
    ["[1]", "{}", "null", '{"estimate": null}', '{"estimate": {"n": 1}}', '{"estimate": {"n": "x"}}', "{"],
)
def test_a_results_file_of_another_shape_is_one_line(
    run: Callable[..., Any], tmp_path: Path, content: str
) -> None:
    out = tmp_path / "out"
    run("--benchmarks", "sums", "--out", str(out))
    path = out / "evaluations/plain/sums.results.json"
    kept = path.read_bytes()
    path.write_text(content)
    for read in (
        lambda: compare_evaluations(out, out),
        lambda: write_lm_eval(out, tmp_path / "exported"),
        lambda: write_evaluation_report(out),
        lambda: write_report(out),
    ):
        with pytest.raises(UserError, match=r"sums\.results\.json"):
            read()
    path.unlink()
    run("--benchmarks", "sums", "--out", str(out), "--resume")
    assert path.read_bytes() == kept


def test_a_foreign_line_in_a_samples_file_does_not_change_the_samples(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("--benchmarks", "sums", "--out", str(out))
    path = out / "evaluations" / "plain" / "sums.samples.jsonl"
    before = path.read_text()
    path.write_text(before + "[1]\n")
    run("--benchmarks", "sums", "--out", str(out), "--resume")
    assert path.read_text() == before


def test_a_password_in_the_endpoints_url_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    for url in ("http://user:hunter2pass@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?api_key=hunter2pass"):
        with pytest.raises(UserError, match="TRUESTEP_API_KEY") as caught:
            run("--benchmarks", "sums", "--engine", url, "--out", str(tmp_path / "out"))
        assert "hunter2pass" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_option_of_zero_counts(run: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('benchmarks = ["sums"]\nfew_shot = 2\n[model]\npath = "tiny"\n')
    data = ["--data", str(tmp_path / "data"), "--json", "--dry-run", "--set", "model.context_length=1024"]
    counted = [
        json.loads(
            CliRunner()
            .invoke(_app(), ["eval", "model", str(recipe), *data, *w], catch_exceptions=False)
            .stdout
        )
        for w in ((), ("--few-shot", "0"))
    ]
    assert counted[1]["total"]["prompt_tokens"] < counted[0]["total"]["prompt_tokens"]


def test_the_mean_of_benchmarks_has_an_interval_within_bounds() -> None:
    members = [b.id for b in benchmarks.TABLE if b.average == "OOD"]
    zero = [
        {"data": id, "prompt": "paper", "whole": True, "score": 0.0, "low": 0.0, "high": 0.03}
        for id in members
    ]
    (found,) = averages(zero)
    assert (found["low"], found["score"]) == (0, 0)
    assert found["high"] == pytest.approx(0.03 / len(members) ** 0.5)
    assert averages(zero[:-1]) == []


def test_a_dry_run_counts_and_writes_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    plan = run("--benchmarks", "sums", "--limit", "2", "--dry-run", "--out", str(tmp_path / "out"))
    assert plan["total"]["samples"] == 6
    assert plan["total"]["generated_tokens_at_most"] == 96
    assert plan["total"]["memory_bytes_at_most"] > 0
    assert not (tmp_path / "out").exists()


def test_templates_hold_the_problem_once_and_shots_come_before_it(run: Callable[..., Any]) -> None:
    del run
    problem = benchmarks.problem_of(benchmarks.BY_ID["sums"], file_items_of("7+1=?", "8"), "here")
    for template in prompts.TEMPLATES:
        for kind in ("math", "choice"):
            turns = prompts.messages_of(template, problem, kind, 2)
            assert turns[-1].role == "user"
            assert sum("7+1=?" in m.content for m in turns) == 1
            assert sum(m.role == "assistant" for m in turns) == 2
    text = prompts.plain_text(prompts.messages_of(prompts.BY_ID["completion"], problem, "math", 1))
    assert text.endswith("\n\nQuestion: 7+1=?\nAnswer:")
    assert prompts.cut("8\n\nQuestion: more", prompts.BY_ID["completion"].stop) == "8"
    brief = prompts.plain_text(
        prompts.messages_of(prompts.BY_ID["brief"], problem, "math", prompts.MOST_SHOTS)
    )
    answers = [line for line in brief.splitlines() if line.startswith("Answer: ")]
    assert len(answers) == prompts.MOST_SHOTS == 8
    assert answers[0] == "Answer: 7 + 5 = 12. The answer is 12"


def test_worked_examples_are_right() -> None:
    for question, answer in (*prompts.WORKED["math"], *prompts.WORKED["brief"]):
        for left, operation, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer):
            by_hand = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
            assert by_hand[operation](int(left), int(right)) == int(result), question
        assert answer.endswith(f"The answer is {re.findall(r'= ([0-9]+)', answer)[-1]}")
    assert {len(shots) for shots in prompts.WORKED.values()} == {8}


def test_what_a_prompt_stops_at_is_tokens_that_spell_it() -> None:
    tokenizer = load_tokenizer(ModelSettings(path="tiny"))
    asker = TokenAdapter(
        tokenizer=tokenizer,
        context_length=64,
        model_eos=None,
        open_engine=lambda: pytest.fail("no engine is needed"),
        pinned_limit=True,
    )
    for template in prompts.TEMPLATES:
        sequences = asker._stop_sequences(template)
        assert bool(sequences) <= bool(template.stop)
        assert all(any(stop in tokenizer.decode(ids) for stop in template.stop) for ids in sequences)
        singles = set(asker._stops(template)) - set(asker._stops(prompts.BY_ID["plain"]))
        assert all(
            prompts.cut(str(tokenizer.decode([i])), template.stop) != tokenizer.decode([i]) for i in singles
        )
        for stop in template.stop:  # whichever way the tokenizer spells it
            ids = tuple(tokenizer(stop, add_special_tokens=False)["input_ids"])
            assert not ids or stop not in tokenizer.decode(ids) or ids in sequences or set(ids) & singles


def file_items_of(question: str, answer: str) -> Any:
    from truestep.evaluate.sources import Item

    return Item(id="x", question=question, answer=answer)


def test_hostile_text_is_text_on_the_page(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--benchmarks", "sums", "--samples", "1", "--out", str(out))
    path = out / "evaluations" / "plain" / "sums.samples.jsonl"
    hostile = "<script>document.title='owned'</script></pre><img src=x onerror=1>\x1b[2J\u202e{{ 7*7 }}"
    fields = ("prompt", "completion", "extracted", "gold", "reason")
    rewritten(
        path,
        lambda rows: [
            row.update(dict.fromkeys(fields, hostile), problem_id=hostile + row["problem_id"]) for row in rows
        ],
    )
    CliRunner().invoke(_app(), ["report", str(out)], catch_exceptions=False)
    page = (out / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert not any(bad in page for bad in ("<script", "<img", "\x1b", "\u202e"))


@pytest.mark.parametrize("name", ["eval-smollm2", "eval-prompts", "demo", "smollm2-gsm8k"])
def test_committed_results_are_still_read(name: str, tmp_path: Path) -> None:
    """Summaries of every version give a page and a table with all their scores."""
    folder = shutil.copytree(RESULTS / name, tmp_path / name)
    (folder / "resolved.toml").touch()
    CliRunner().invoke(_app(), ["report", str(folder)], catch_exceptions=False)
    summary, page = json.loads((folder / "summary.json").read_text()), (folder / "report.html").read_text()
    rows = score_table(folder)
    assert [row.score for row in rows] == [score["score"] for score in summary["scores"]]
    assert all(row.data and row.data in page for row in rows)


def test_a_recipe_of_short_keys_is_the_long_one() -> None:
    """Those of earlier versions, of which results/ holds one."""
    old = evaluation_settings(read_recipe(RESULTS / "eval-smollm2" / "resolved.toml"), "old")
    new = evaluation_settings(read_recipe(RESULTS.parent / "recipes/eval/smollm2.toml"), "new")
    assert changed(old, new) == []
    kept = ("benchmarks", "prompts", "few_shot", "limit", "limits", "sampling", "engine")
    assert [getattr(old.evaluate, k) for k in kept] == [getattr(new.evaluate, k) for k in kept]
    again = evaluation_settings(tomllib.loads(to_toml(new.model_dump(mode="json"))), "resolved")
    assert again == new


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "no benchmarks are given"),
        ({"benchmarks": ["gsm9k"]}, 'did you mean "gsm8k"'),
        ({"benchmarks": ["gsm8k"], "prompts": ["qwem"]}, "is not one of"),
        ({"benchmarks": ["gsm8k"], "temprature": 0}, "temprature"),
        ({"benchmarks": ["gsm8k"], "limits": {"svamp": 3}}, "limits.svamp"),
    ],
)
def test_what_an_evaluation_refuses(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluation_settings({"model": {"path": "tiny"}, **raw}, "recipe")


def test_an_unknown_engine_is_refused_before_a_model_is_loaded() -> None:
    recipe = {"model": {"path": "nowhere"}, "benchmarks": ["gsm8k"], "engine": "tensorrt"}
    with (
        pytest.raises(UserError, match="expected torch, vllm"),
        opened(evaluation_settings(recipe, "recipe")),
    ):
        pass


def test_a_run_samples_with_torch_only() -> None:
    recipe = Path(__file__).parents[2] / "recipes/demo.toml"
    with pytest.raises(UserError, match=r"evaluate\.engine"):
        prepare(load_settings(recipe, ["evaluate.engine=vllm"]), base_dir=recipe.parent)
