"""A folder with reward.py, row.py and a recipe, and no fork: it trains, resumes, and reports the parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import UserError
from truestep.pipeline import method_check
from truestep.pipeline.method_check import check_method
from truestep.pipeline.prepare import find_method, prepare
from truestep.pipeline.run import open_run_folder, run
from truestep.settings import load_settings
from truestep.train.parallel import Ranks

REWARD = '''
def concise(samples, target=40):
    """Shorter is better; the row's own columns can be read."""
    assert all(s.problem.answer and s.messages and s.limit == 24 for s in samples)
    return [{"short": -len(s.completion_ids) / target, "digits": float(any(c.isdigit() for c in s.completion))}
            for s in samples]
'''
ROW = '''
from truestep.objective import coefficients
from truestep.objective.advantage import group_mean
from truestep.objective.methods.rl import clipped_term, policy_term
from truestep.objective.methods.row import Method
from truestep.objective.normalise import Normaliser


def wide(*, high: float = 0.5) -> Method:
    term = clipped_term(0.2, high, Normaliser.SEQUENCES)
    return Method(name="wide", terms=(term,), advantage=group_mean)


def local_mean() -> Method:
    """Wrong: it divides by the mean advantage of whatever micro-batch a token is in."""
    def coefficient(context):
        return context.advantage / context.advantage.abs().mean().clamp(min=1e-6)
    return Method(name="local_mean", terms=(policy_term(coefficient, Normaliser.TOKENS),))


def undeclared() -> Method:
    return Method(name="undeclared", terms=(policy_term(coefficients.kl_k2, Normaliser.TOKENS),))


def broken() -> Method:
    return 1 / 0


def nothing() -> Method:
    return None
'''
RECIPE = """
name = "own"
[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 2, num_heads = 2, intermediate_size = 64 }
[compute]
threads = 1
[data.d]
source = "procedural:addition"
limit = 32
[[stages]]
kind = "sft"
data = "d"
steps = 2
sequences_per_step = 8
tokens_per_microbatch = 1024
optimizer = { lr = 2e-3 }
[[stages]]
kind = "rl"
data = "d"
steps = 4
prompts_per_step = 2
samples_per_prompt = 4
tokens_per_microbatch = 1024
method = "row.py:wide"
method_options = { high = 0.4 }
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 24 }
save_every = 1
keep_checkpoints = 4
[[stages.rewards]]
function = "checker"
[[stages.rewards]]
function = "reward.py:concise"
weight = 0.5
options = { target = 10 }
"""


class Silent:
    def say(self, text: str) -> None: ...

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None: ...

    def advance(self, done: int, note: str = "") -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    for name, text in (("reward.py", REWARD), ("row.py", ROW), ("recipe.toml", RECIPE)):
        (made / name).write_text(text)
    return made


def train(folder: Path, out: Path, *, resume: bool = False) -> None:
    prepared = prepare(load_settings(folder / "recipe.toml"), base_dir=folder)
    open_run_folder(prepared, out, resume=resume, rank=0)
    run(prepared, out, ranks=Ranks(), reporter=Silent())


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(folder, folder / "whole")
    return folder / "whole"


def rows(run_: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_ / "stages/02-rl/metrics.jsonl").read_text().splitlines()]


def test_an_own_reward_and_row_train_and_report_their_parts(whole: Path, folder: Path) -> None:
    found = rows(whole)
    assert len(found) == 4
    for row in found:
        parts = row["rl/reward/concise/short"] + row["rl/reward/concise/digits"]
        assert row["rl/reward/concise"] == pytest.approx(parts)
        assert row["rl/reward"] == pytest.approx(row["rl/reward/checker"] + 0.5 * parts)
        assert row["rl/reward_failures"] == 0
    assert any(row["rl/grad_norm"] > 0 for row in found)
    done = json.loads((whole / "stages/02-rl/done.json").read_text())
    assert done["method"] == "wide"
    code = json.loads((whole / "summary.json").read_text())["code"]["rl"]
    assert set(code) == {"row.py:wide", "concise"}
    samples = [json.loads(line) for line in (whole / "stages/02-rl/rollouts.jsonl").read_text().splitlines()]
    assert set(samples[0]["parts"]) == {"checker", "concise", "concise/short", "concise/digits"}


def test_it_resumes_bit_for_bit(whole: Path, folder: Path) -> None:
    again = folder / "again"
    shutil.copytree(whole, again)
    stage = again / "stages/02-rl"
    (stage / "done.json").unlink()
    for step in (3, 4):
        shutil.rmtree(stage / f"checkpoints/step_{step:08d}")
    train(folder, again, resume=True)
    for name in ("metrics.jsonl", "rollouts.jsonl", "export/model.safetensors"):
        assert (stage / name).read_bytes() == (whole / "stages/02-rl" / name).read_bytes(), name


def test_changed_code_is_another_stage(whole: Path, folder: Path) -> None:
    other = folder / "changed"
    other.mkdir()
    for name in ("reward.py", "row.py", "recipe.toml"):
        shutil.copy(folder / name, other / name)
    shutil.copytree(whole, other / "run")
    train(other, other / "run", resume=True)  # the same code elsewhere is the same stage
    (other / "row.py").write_text(ROW.replace("0.2, high", "0.1, high"))
    with pytest.raises(UserError, match=r"begun with other code of stages\.\w+ \("):
        train(other, other / "run", resume=True)


BARE = (
    """
def judge(samples):
    """
    + '"""Data without answers, read by its own columns."""'
    + """
    return [float(s.problem.columns["wanted"] in s.completion) for s in samples]

def broken(samples):
    raise KeyError("never")

import_error = 1 / DENOMINATOR
"""
)


def test_a_reward_without_a_checker_needs_no_answers_and_reads_every_column(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(BARE.replace("DENOMINATOR", "1"))
    problems = [{"problem": f"Say {i}.", "wanted": str(i)} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    head, _, rl = RECIPE.partition('[[stages]]\nkind = "sft"')
    stage = "[[stages]]" + rl.partition("[[stages]]")[2].partition("[[stages.rewards]]")[0]
    stage = stage.replace('method = "row.py:wide"\nmethod_options = { high = 0.4 }\n', "")
    head = head.replace("procedural:addition", "p.jsonl").replace("limit = 32\n", "")
    text = head + stage + 'reward = "reward.py:judge"\n'
    (tmp_path / "recipe.toml").write_text(text)
    train(tmp_path, tmp_path / "run")
    done = [
        json.loads(line) for line in (tmp_path / "run/stages/01-rl/metrics.jsonl").read_text().splitlines()
    ]
    assert len(done) == 4
    assert all(row["rl/unscored"] == 0 and 0 <= row["rl/reward"] <= 1 for row in done)
    asked = text.replace('reward = "reward.py:judge"', 'reward = "checker"')
    (tmp_path / "recipe.toml").write_text(asked)
    with pytest.raises(UserError, match="answer"):
        prepare(load_settings(tmp_path / "recipe.toml"), base_dir=tmp_path)


def test_a_reward_that_cannot_be_loaded_is_found_before_anything_is_trained(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("row.py", "recipe.toml"):
        shutil.copy(folder / name, tmp_path / name)
    for text, message in (
        (BARE.replace("DENOMINATOR", "0"), "ZeroDivisionError"),
        (BARE.replace("DENOMINATOR", "1"), "concise does not exist"),
        (REWARD.replace("target=40", "aim=40"), "target"),
    ):
        (tmp_path / "reward.py").write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(load_settings(tmp_path / "recipe.toml"), base_dir=tmp_path)


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        ("row.py:wyde", {}, 'wyde does not exist in .*row.py; did you mean "wide"'),
        ("rows.py:wide", {}, "rows.py does not exist; did you mean"),
        ("row.py:wide", {"hi": 1.0}, "method_options.hi is unknown; wide has high"),
        ("row.py:broken", {}, r"ZeroDivisionError.*line \d+, in broken"),
        ("row.py:nothing", {}, "NoneType"),
    ],
)
def test_a_row_that_cannot_be_built_says_why(
    folder: Path, named: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_method(named, options, folder)


@pytest.mark.slow
def test_every_relation_holds_for_a_right_row(folder: Path, tmp_path: Path) -> None:
    found = list(check_method("row.py:wide", {}, base_dir=folder, folder=tmp_path, reporter=Silent()))
    assert len(found) == 6
    assert all(relation.holds for relation in found), found
    assert max(relation.error for relation in found) < 1e-12


def test_a_row_that_reads_its_micro_batch_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_check, "STEPS", 1)
    relations = check_method("row.py:local_mean", {}, base_dir=folder, folder=tmp_path, reporter=Silent())
    found = {r.name: r for r in (next(relations) for _ in range(4))}
    assert not found["micro-batches"].holds
    assert found["order"].holds


def test_a_row_that_does_not_declare_a_column_is_told(folder: Path, tmp_path: Path) -> None:
    relations = check_method("row.py:undeclared", {}, base_dir=folder, folder=tmp_path, reporter=Silent())
    with pytest.raises(Exception, match=r"reads reference_logprobs.*declare needs"):
        next(relations)


def test_edited_code_is_what_runs(tmp_path: Path) -> None:
    """Within the same second and with the same size, byte code of what stood there before would be taken."""
    row = tmp_path / "row.py"
    for name in ("wid3", "wid4"):
        row.write_text(ROW.replace('name="wide"', f'name="{name}"'))
        assert find_method("row.py:wide", {}, tmp_path).name == name
        assert not (tmp_path / "__pycache__").exists()


TRIED = """
def right(samples):
    assert samples[0].completion and samples[0].completion_ids and samples[0].verdict == "correct"
    return [1.0]

def short(samples):
    return [1 / (not s.completion) for s in samples]

def never(samples):
    return [s.solution for s in samples]

def count(samples):
    return 1.0

def needy(samples):
    return [float(s.verdict == "correct") / (s.verdict is not None) for s in samples]
"""


def test_a_reward_is_tried_before_anything_is_sampled(folder: Path) -> None:
    """One that fails on the solution and on an empty completion is refused, unless all samples may fail."""
    (folder / "tried.py").write_text(TRIED)
    faults = {}
    for name in ("right", "short", "never", "count", "needy"):
        for share in ("0.05", "1.0") if name == "never" else ("0.05",):
            reward = f'{{ function = "tried.py:{name}", max_failure_share = {share} }}'
            settings = load_settings(
                folder / "recipe.toml", [f'stages.rl.rewards=[{{ function = "checker" }}, {reward}]']
            )
            try:
                prepare(settings, base_dir=folder)
            except UserError as error:
                faults[name, share] = str(error)
    assert {name for name, _ in faults} == {"never", "count"}
    assert ("never", "1.0") not in faults
    told = faults["never", "0.05"]
    assert 'reward "never" failed on a trial with ' in told
    assert "has no attribute 'solution'" in told
    assert "Traceback (most recent call last):\n  File " in told
    assert "expected a list with one value for each of 1 sample" in faults["count", "0.05"]
