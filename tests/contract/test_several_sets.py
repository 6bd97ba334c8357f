"""Several data sets in a stage: exact in resume, with metrics for each, in SFT and in RL."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tiny_runs import differing, fingerprint, go, interrupted_at, prepared, write_recipe

from truestep import rundir
from truestep.errors import UserError
from truestep.pipeline.prepare import Prepared
from truestep.pipeline.sizes import batch_table
from truestep.pipeline.systems import notes_of_systems, system_of
from truestep.records import Message, Problem
from truestep.settings import load_settings
from truestep.signals import Interrupted

MIX = 'data=[{ name = "train", weight = 2 }, { name = "other" }]'
SHORT = ("evaluate.data=[]", "stages.sft.steps=7", "stages.rl.steps=3", "stages.sft.save_every=3")
OTHER = ("data.other.source=other.jsonl",)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second set has the same ids as the first one, and different sums."""
    path = write_recipe(tmp_path_factory.mktemp("mixed"))
    rows = [json.loads(line) for line in (path.parent / "train.jsonl").read_text().splitlines()][:5]
    for i, row in enumerate(rows):
        row.update(problem=f"{i}*{i}", answer=str(i % 3), solution=str(i % 3))
    (path.parent / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def made(recipe: Path) -> Prepared:
    return prepared(recipe, *SHORT, *OTHER, f"stages.sft.{MIX}", f"stages.rl.{MIX}")


@pytest.fixture(scope="module")
def whole(made: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        alarm = interrupted_at(patch, 10**9)
        go(made, folder)
    return folder, len(alarm.looks)


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_at_random_and_resumed_is_never_interrupted(
    made: Prepared, whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    expected, looks = whole
    draw, folder, times = random.Random(seed), tmp_path / "run", 0
    for _ in range(3):
        with monkeypatch.context() as patch:
            interrupted_at(patch, draw.randrange(looks))
            try:
                go(made, folder, resume=times > 0)
                break
            except Interrupted:
                times += 1
    go(made, folder, resume=True)
    assert times > 0
    assert differing(fingerprint(folder), fingerprint(expected)) == []


def test_every_set_has_its_share_and_its_metrics(whole: tuple[Path, int]) -> None:
    rows = rundir.read_jsonl(whole[0] / "stages/01-sft/metrics.jsonl")
    places = {name: [row[f"sft/data_rows/{name}"] for row in rows] for name in ("train", "other")}
    assert all(a + b == 8 for a, b in zip(places["train"], places["other"], strict=True))
    assert abs(sum(places["train"]) - 56 * 2 / 3) < 1
    for row in rows:  # every row has two trained tokens, so the mean over all is the mean over both sets
        parts = [row[f"sft/data_rows/{name}"] * row[f"sft/data_nll/{name}"] for name in places]
        assert sum(parts) / 8 == pytest.approx(row["sft/nll"], rel=1e-5)
        assert row["sft/data_nll/train"] != row["sft/data_nll/other"]
    for row in rundir.read_jsonl(whole[0] / "stages/02-rl/metrics.jsonl"):
        parts = [row[f"rl/data_rows/{name}"] * row[f"rl/data_reward/{name}"] for name in places]
        assert sum(parts) / 4 == pytest.approx(row["rl/reward"])
        assert {f"rl/data_solved/{name}" for name in places} <= row.keys()
    ids = {
        row["problem_id"].split("/")[0] for row in rundir.read_jsonl(whole[0] / "stages/02-rl/rollouts.jsonl")
    }
    assert ids == {"train", "other"}
    assert json.loads((whole[0] / "summary.json").read_text())["stages"][0]["data"] == "train+other"


def test_the_stage_ends_by_the_epochs_of_the_named_set(recipe: Path) -> None:
    def sft(*overrides: str) -> dict[str, object]:
        changed = [f"stages.sft.{o}" for o in (MIX, "steps=0", *overrides)]
        made = prepared(recipe, *OTHER, "evaluate.data=[]", *changed)
        return dict(batch_table(made, 1)[0])

    # 16 of 24 places are of train, which has 12 rows; 8 of other, which has 5
    assert sft("epochs=2", "epochs_of=train")["steps"] == 5  # after 4 steps, 21 of 24 were seen
    assert sft("epochs=1", "epochs_of=other")["steps"] == 2
    assert sft("epochs=2", "epochs_of=train")["problems"] == 17
    assert "train 2.25 (weight 2), other 2.60 (weight 1)" in str(sft("epochs=2", "epochs_of=train")["epochs"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([f"stages.sft.{MIX}", "stages.sft.steps=0", "stages.sft.epochs=1"], "epochs of which data set.*train, other"),
        (["stages.sft.steps=0", "stages.sft.epochs=1", "stages.sft.epochs_of=train"], "epochs_of is for"),
        (['stages.sft.data=[{ name = "train" }, { name = "train" }]'], '"train" twice'),
        (['stages.sft.data=[{ name = "train" }, { name = "tset" }]'], '"tset" is not a data set'),
        (['stages.sft.data=[{ name = "train" }, { name = "other", weight = 0 }]'], "weight.*greater than 0"),
        ([f"stages.rl.{MIX}", "stages.rl.prompts_per_step=16"], "5 problems of data.other.* weight asks for 6"),
        ([f"stages.rl.{MIX}", 'stages.rl.dev={ data = "other", every_steps = 1 }'], "also used for training"),
    ],
)  # fmt: skip
def test_what_is_refused(recipe: Path, changed: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        prepared(recipe, *OTHER, "evaluate.data=[]", *changed)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------- overlong prompts


def with_long(recipe: Path, folder: Path, num_long: int) -> Path:
    path = write_recipe(folder)
    rows = [json.loads(line) for line in (path.parent / "train.jsonl").read_text().splitlines()]
    for row in rows[:num_long]:
        row["problem"] += " " * 200 + "1"
    (path.parent / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_overlong_prompts_are_left_out_up_to_the_declared_share(recipe: Path, tmp_path: Path) -> None:
    path, context = with_long(recipe, tmp_path, 2), "model.context_length=100"
    made = prepared(path, context, "data.train.overlong_share=0.2", "evaluate.data=[]")
    assert [len(prompts) for prompts in made.stage_prompts["rl"]] == [10]
    said = "stages.rl: 2 of 12 prompts of data.train are longer than 97 tokens"
    assert any(note.startswith(said) for note in made.notes)
    assert any("2 of 12 demonstrations are longer than the context" in note for note in made.notes)
    remedy = (
        r"q0.* takes 2\d\d of 100 tokens; .*data\.train\.overlong_share, to leave out the 2 of 12 prompts"
    )
    for share in ("", "data.train.overlong_share=0.1"):  # the default is 0.05
        with pytest.raises(UserError, match=remedy.replace("q0", r"train\.jsonl:1")):
            prepared(path, context, "evaluate.data=[]", *([share] if share else []))
    with pytest.raises(
        UserError, match=r"evaluate\.sampling\.max_new_tokens .*train\.jsonl:1"
    ):  # tests stay whole
        prepared(path, context, "data.train.overlong_share=0.2", 'evaluate.data=["train"]')


def test_a_system_prompt_that_only_training_has_is_said(recipe: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    rows = [json.loads(line) for line in (path.parent / "train.jsonl").read_text().splitlines()]
    for row in rows[:4]:
        row["system"] = "be brief"
    (path.parent / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    roomy = [f"stages.{name}.tokens_per_microbatch=90" for name in ("sft", "rl")]
    said = "4 of 12 rows of data.train have a system prompt, but no row of data.test has one"
    assert sum(said in note for note in prepared(path, *roomy).notes) == 1
    for change in ("chat.system=be brief", "evaluate.data=[]"):
        assert not any("system prompt" in note for note in prepared(path, *roomy, change).notes)


def test_a_system_prompt_of_the_base_model_that_no_row_has_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    rundir.mark_export(tmp_path, system="be\nbrief")
    recipe = write_recipe(tmp_path / "recipe")
    based, bare = load_settings(recipe, [f"model.path={tmp_path}"]), {"test": with_systems("", "")}
    (note,) = notes_of_systems(based, {"train": with_systems("")}, bare)
    assert 'with the system prompt "be brief", but no row of data.train and data.test has one' in note
    (note,) = notes_of_systems(based, {"train": with_systems("a", "")}, bare)
    assert note.startswith("1 of 2 rows of data.train has a system prompt")
    assert not notes_of_systems(load_settings(recipe, []), {"train": with_systems("")}, bare)
    with_own = load_settings(recipe, [f"model.path={tmp_path}", "chat.system=be brief"])
    assert not notes_of_systems(with_own, {"train": with_systems("")}, bare)
    assert not notes_of_systems(based, {"train": with_systems("a")}, {"test": with_systems("b")})


def with_systems(*systems: str) -> list[Problem]:
    user = Message(role="user", content="1+1")
    turns = [((Message(role="system", content=s), user) if s else (user,)) for s in systems]
    return [Problem(id=str(i), answer="2", messages=given) for i, given in enumerate(turns)]


def test_the_system_prompt_of_a_set_is_that_of_most_rows() -> None:
    assert system_of(with_systems("a", "", "a", "b"), "") == "a"
    assert system_of(with_systems("a", "", ""), "") == ""
    assert system_of(with_systems("a", "", ""), "c") == "c"
    assert system_of(with_systems("a", ""), "") == "a"  # half of them
    assert system_of([], "c") == ""
