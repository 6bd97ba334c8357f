"""The Python interface: what it offers, that it does what the commands do, and that its examples run."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import truestep
from truestep import api
from truestep.errors import UserError
from truestep.rundir import read_jsonl

pytest.importorskip("torch")

# Users write these names. A name may be added here; one that is removed or renamed breaks their code.
SURFACE = {
    "Run": ["path", "summary", "status", "scores", "stages", "metrics", "frame", "checkpoints", "model", "samples",
            "report", "folder"],
    "Audit": ["finding", "verdict", "codes", "weights", "tokens"],
    "train": ["recipe", "out", "resume", "overrides", "change", "strict", "quiet"],
    "evaluate": ["model", "benchmarks", "out", "resume", "overrides", "quiet", "settings"],
    "compare": ["a", "b", "metric"],
    "grade": ["gold", "completion", "choices"],
    "audit": ["step", "arch", "accumulation", "seed", "objective", "resume"],
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "api",
    "model": {
        "path": "tiny",
        "tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32},
    },
    "compute": {"threads": 1},
    "data": {
        "train": {"source": "procedural:addition", "limit": 8},
        "test": {"source": "procedural:addition", "split": "test", "limit": 3},
    },
    "evaluate": {"data": ["test"], "sampling": {"max_new_tokens": 8}},
    "stages": [
        {
            "kind": "sft",
            "data": "train",
            "steps": 3,
            "sequences_per_step": 4,
            "tokens_per_microbatch": 4096,
            "optimizer": {"lr": 1e-2},
        }
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    found = truestep.train(RECIPE, out=tmp_path_factory.mktemp("api") / "run", quiet=True)
    assert isinstance(found, api.Run)
    return found


def test_the_surface() -> None:
    assert set(api.NAMES) == set(SURFACE)
    for name in api.NAMES:
        found = getattr(truestep, name)
        assert name in dir(truestep)
        if inspect.isclass(found):
            own = [n for n in dir(found) if not n.startswith("_")]
            own += [field for field in found.__dataclass_fields__ if field not in own]
            assert sorted(own) == sorted(SURFACE[name])
        else:
            assert list(inspect.signature(getattr(api, name)).parameters) == SURFACE[name]


def test_packages_are_also_verbs() -> None:
    """In a fresh process, whichever is imported first, and without torch."""
    code = (
        "import sys, truestep; assert 'torch' not in sys.modules; import truestep.grade.pairs; "
        "assert truestep.grade('2', '2')['verdict'] == 'correct'; assert 'torch' not in sys.modules; "
        "import truestep.train.order; assert callable(truestep.train); "
        "from truestep import compare, Run; assert not hasattr(truestep, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_what_the_command_makes(run: api.Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    from truestep.rundir import to_toml

    recipe.write_text(to_toml(RECIPE))
    command = [sys.executable, "-m", "truestep", "run", str(recipe), "--out", str(tmp_path / "cli"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert json.loads(done.stdout)["scores"] == run.scores
    rows = read_jsonl(tmp_path / "cli/stages/01-sft/metrics.jsonl")
    found = run.metrics("sft")
    assert found["step"].tolist() == [1, 2, 3]
    assert found["loss"].tolist() == [row["sft/loss"] for row in rows]
    assert (run.status, run.stages) == ("done", ["sft"])
    assert (run.model / "config.json").is_file()
    assert [path.name for path in run.checkpoints()] == ["step_00000003"]
    assert run.report.is_file()
    assert len(run.samples("test", "sft")) == 3
    assert run.samples() == run.samples("test", "sft")
    assert "<table>" in run._repr_html_()


def test_metrics_as_a_frame(run: api.Run) -> None:
    pandas = pytest.importorskip("pandas")
    frame = run.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "step"
    assert np.array_equal(frame["loss"], run.metrics()["loss"])


def test_errors_are_one_sentence(run: api.Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stages"):
        truestep.train(RECIPE | {"stages": [{"kind": "sft"}]}, out=tmp_path / "x", quiet=True)
    with pytest.raises(UserError, match=r"stages\.sft\.steps=x|steps"):
        truestep.train(RECIPE, out=tmp_path / "x", overrides=["stages.sft.steps=x"], quiet=True)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match='has no stage "rl"; it has sft'):
        run.metrics("rl")
    with pytest.raises(UserError, match="has no samples of nothing"):
        run.samples("nothing")
    with pytest.raises(UserError, match="has no samples of nothing · sft; it has test · base, test · sft"):
        run.samples("nothing", "sft")
    assert run.samples("base") == run.samples("test", "base") != run.samples("sft")
    for folder, said in (
        (run.path.with_name("runs"), 'runs does not exist; did you mean "run"'),
        (run.path.parent, f"is not a run directory; its run is {run.path}"),
        (run.path / "stages", "stages is not a run directory; pass the folder"),
        (run.path.parent / "other", "other does not exist; .* has the runs run"),
    ):
        with pytest.raises(UserError, match=said):
            api.Run(folder)
    with pytest.raises(UserError, match="already"):
        truestep.train(RECIPE, out=run.path, quiet=True)
    assert RECIPE["stages"][0]["steps"] == 3, "the caller's table is not changed"


def test_interrupted_and_resumed(run: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from truestep import signals
    from truestep.train import loop

    train = loop.train

    def once(spec: Any, state: Any, *more: Any, **options: Any) -> Any:
        if state.step == 1:
            signals._pending.append(2)
        return train(spec, state, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", once)
        with pytest.raises(KeyboardInterrupt, match=r"saved\. To continue, .*out='.*run', resume=True"):
            truestep.train(RECIPE, out=tmp_path / "run", quiet=True)
    assert api.Run(tmp_path / "run").status == "interrupted"
    again = truestep.train(RECIPE, out=tmp_path / "run", resume=True, quiet=True)
    assert again.scores == run.scores
    assert again.metrics()["loss"].tolist() == run.metrics()["loss"].tolist()


def test_a_run_directory_is_its_last_model(run: api.Run, tmp_path: Path) -> None:
    from truestep.evaluate.jobs import evaluation_settings
    from truestep.model.load import model_content, resolve
    from truestep.settings import ModelSettings

    def content(path: Path) -> str:
        return model_content(ModelSettings(path=str(path)))

    export = run.path / "stages/01-sft/export"
    assert run.model == export == Path(resolve(ModelSettings(path=str(run.path))))
    assert content(run.path) == content(export) != ""
    for path in (run.path, export):
        raw = {"model": {"path": str(path)}, "benchmarks": ["own.jsonl"]}
        assert evaluation_settings(raw, "here").name == "eval-run"
    unfinished, study = tmp_path / "unfinished", tmp_path / "study"
    for folder in (unfinished, study):
        folder.mkdir()
    (unfinished / "resolved.toml").write_text("")
    (study / "study.toml").write_text("")
    for folder, said in (
        (unfinished, "unfinished is a run without a finished stage"),
        (study, "the folder of a study, .*cells/KEY/run"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(ModelSettings(path=str(folder)))


def test_evaluate_and_compare(run: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{n}+{n}", "answer": str(2 * n)} for n in range(3)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how: dict[str, Any] = {"prompts": ["brief"], "max_new_tokens": 8, "quiet": True}
    before = truestep.evaluate(run.path, "own.jsonl", out="before", **how)
    after = truestep.evaluate(str(run.model), ["own.jsonl"], out="after", temperature=0.9, **how)
    (row,) = truestep.compare(before, after)["comparisons"]
    assert row["num_problems"] == 3
    assert row["difference"] == after.scores[0]["score"] - before.scores[0]["score"]
    with pytest.raises(UserError, match='max_new_token: unknown key; did you mean "max_new_tokens"'):
        truestep.evaluate(run.model, "own.jsonl", out="x", max_new_token=8, quiet=True)
    with pytest.raises(UserError, match=r"steps: unknown key; expected one of benchmarks, checker.*few_shot"):
        truestep.evaluate(run.model, "own.jsonl", out="x", overrides=["steps=8"], quiet=True)
    with pytest.raises(UserError, match="chat: an evaluation of benchmarks does not use this setting"):
        truestep.evaluate(run.model, "own.jsonl", out="x", chat={"user": "{problem}"}, quiet=True)


def test_evaluate_takes_what_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text('{"q": "1+1", "answer": "2"}\n')
    Path("tpl.toml").write_text('[[template]]\nid = "bare"\nmath = "{problem}"\n')
    Path("f.py").write_text("def g(samples):\n    return [2.0 for s in samples]\n")
    small = ["model.context_length=256", "model.tiny.hidden_size=16", "model.tiny.num_heads=2"]
    run = truestep.evaluate(
        "tiny", "own.jsonl", out="x", prompts="tpl.toml", scorers=["f.py:g", {"function": "format"}],
        columns={"problem": "q"}, overrides=["max_new_tokens=3", *small], quiet=True,
    )  # fmt: skip
    assert run.scores[0]["prompt"] == "bare"
    assert run.scores[0]["rewards"]["g"]["value"] == 2.0
    assert set(run.scores[0]["rewards"]) == {"format", "g"}
    assert max(row["num_tokens"] for row in run.samples()) <= 3


def test_verbs_are_shown_as_functions() -> None:
    """In a new process, because torch is imported here already."""
    code = (
        "import inspect, sys, truestep.api\n"
        "for name in ('train', 'evaluate', 'grade', 'audit'):\n"
        "    verb, function = getattr(truestep, name), getattr(truestep.api, name)\n"
        "    assert inspect.signature(verb) == inspect.signature(function)\n"
        "    assert verb.__doc__.startswith(name + '(') and function.__doc__ in verb.__doc__\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paths_and_runs_are_taken_where_folders_are(
    run: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    found = truestep.evaluate(
        run, [Path("own.jsonl")], out="out", prompts=["brief"], max_new_tokens=4, quiet=True
    )
    assert found.scores[0]["data"] == "own"
    with pytest.raises(UserError, match="exactly one of epochs"):  # the path of the model is a text by then
        truestep.train(
            {**RECIPE, "model": {"path": Path("x")}, "stages": [{**RECIPE["stages"][0], "steps": 0}]},
            quiet=True,
        )
    for call in (
        lambda: truestep.train(3),
        lambda: truestep.evaluate(3, "own.jsonl"),
        lambda: truestep.audit("x"),
    ):
        with pytest.raises(UserError, match=r"needs (a|the)"):
            call()


def test_training_runs_are_compared_by_their_last_checkpoints(run: api.Run) -> None:
    (row,) = truestep.compare(run, run)["comparisons"]
    assert (row["a"]["of"], row["b"]["of"]) == ("sft", "sft")
    (row,) = truestep.compare(run.path / "evaluations/base", run)["comparisons"]
    assert (row["a"]["of"], row["b"]["of"]) == ("base", "sft")


def my_step(model: Any, optimizer: Any, microbatches: Any) -> None:
    import torch

    total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in microbatches)
    for batch in microbatches:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"})
        logits = getattr(logits, "logits", logits)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        (loss / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_audit_and_grade() -> None:
    found = truestep.audit(my_step)
    assert (found.verdict, found.codes) == ("RIGHT", [])
    assert found.weights == pytest.approx([1.0] * 4, abs=1e-4)
    assert len(found.tokens) == 4
    assert "weights per micro-batch: 1" in str(found)
    assert truestep.grade("B", "The answer is (B).", choices=["x", "y"])["verdict"] == "correct"
    assert truestep.grade("3", "I do not know")["verdict"] == "incorrect"


def test_every_name_has_an_example_that_runs(
    run: api.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of the docstrings, with a small run in the place of theirs."""
    from truestep.rundir import to_toml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo.toml").write_text(to_toml(RECIPE))
    Path("my.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    how: dict[str, Any] = {"prompts": ["brief"], "max_new_tokens": 8, "quiet": True}
    for name in ("before", "after"):
        truestep.evaluate(run.model, "my.jsonl", out=f"runs/{name}", **how)

    def small(model: Any, benchmarks: Any, **more: Any) -> api.Run:
        found = truestep.evaluate(run.model, [b for b in benchmarks if b == "my.jsonl"], **how, **more)
        assert isinstance(found, api.Run)
        return found

    names = {
        "Run": lambda folder: run, "Audit": api.Audit, "finding": truestep.audit(my_step).finding,
        "train": truestep.train, "evaluate": small, "compare": truestep.compare,
        "grade": truestep.grade, "audit": truestep.audit, "my_step": my_step,
    }  # fmt: skip
    for name in api.NAMES:
        text = inspect.getdoc(getattr(api, name)) or ""
        examples = doctest.DocTestParser().get_examples(text)
        assert examples, name
        made = dict(names)
        for example in examples:
            tree = ast.parse(example.source)
            last = tree.body[-1]
            assert isinstance(last, ast.Expr | ast.Assign)
            exec(compile(tree, name, "exec"), made)
