"""The runner, with children that make up their results: what is run, in which order, how often, and what is
kept."""

from __future__ import annotations

import json
import os
import signal
import time
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from micro import STUDY, write_study

from truestep import rundir
from truestep.cli.study import write_cell
from truestep.errors import UserError
from truestep.pipeline.code import code_of
from truestep.settings import OptimizerSettings, RlSettings, SamplingSettings, load_settings
from truestep.study import processes
from truestep.study.cell_runner import Runner, base_identity, with_absolute_paths
from truestep.study.load import load_study
from truestep.study.processes import Order
from truestep.study.run import run_cells, tables_of, tuning_cost
from truestep.study.table import results

STAMP = {"commit": "0" * 40, "uncommitted_changes": False, "versions": {}, "hardware": {"cpu": "none"}}


class Children:
    """Stands for the child processes: trains nothing, writes the files that a run leaves, and remembers."""

    def __init__(self, fail: str = "", stop_after: int = 10**9) -> None:
        self.trained: Counter[str] = Counter()
        self.orders: list[str] = []
        self.fail, self.stop_after = fail, stop_after

    def __call__(self, order: Order) -> tuple[int, str]:
        settings = load_settings(Path(order.study) / order.recipe)
        run = Path(order.study) / order.run
        self.orders.append(settings.name)
        if len(self.orders) > self.stop_after:
            raise RuntimeError("killed")
        if settings.stages:
            last, rate = settings.stages[-1].name, settings.stages[-1].optimizer.lr
            if self.fail in (f"{last}-s{settings.seed}", f"{last}-s{settings.seed}-lr{rate:g}"):
                return 3, "error: it does not want to"
        stages = []
        for index, stage in enumerate(settings.stages):
            folder = run / "stages" / f"{index + 1:02d}-{stage.name}"
            if not (folder / "done.json").exists():
                coin = "-coin" if getattr(stage, "reward", "") == "random" else ""
                self.trained[f"{stage.name}-s{settings.seed}-lr{stage.optimizer.lr:g}{coin}"] += 1
                cost = 100.0 * getattr(stage, "steps", 1) * (5 if stage.kind == "rl" else 1)
                rundir.write_json(folder / "done.json", {
                    "name": stage.name, "kind": stage.kind, "method": getattr(stage, "method", "sft"),
                    "steps": getattr(stage, "steps", 1), "seconds": 1.0, "data": stage.data, "best": {},
                    "tokens": {"demonstration_tokens": 10, "rollout_tokens": 0}, "flops_paper": cost,
                    "flops_full": 2 * cost,
                })  # fmt: skip
                rundir.write_atomic(folder / "export" / "model.safetensors", f"{settings.seed}{stage.name}")
                rundir.append_jsonl(folder / "metrics.jsonl", [{"step": 1, f"{stage.name}/reward": 0.5}])
            stages.append(rundir.read_json(folder / "done.json"))
        for checkpoint in ("base", *(s.name for s in settings.stages)):
            for data in settings.evaluate.data:
                self._evaluate(run, checkpoint, data, settings)
        rundir.write_json(run / "summary.json", {
            "status": "done", "stages": stages, "overlap": None, "notes": [], "content": {"test": "abc"},
            "scores": [{"checkpoint": c, "data": d, "score": 0.5} for c in ("base", *(s.name for s in settings.stages))
                       for d in settings.evaluate.data],
        })  # fmt: skip
        rundir.write_json(run / "provenance.json", STAMP)
        return 0, ""

    def _evaluate(self, run: Path, checkpoint: str, data: str, settings: Any) -> None:
        level = {"base": 1, "sft": 4, "rl": 7, "more": 4, "rejection": 6}.get(checkpoint, 5)
        if settings.stages and checkpoint == settings.stages[-1].name and checkpoint == "rl":
            level += (
                1 if settings.stages[-1].optimizer.lr > 1.5e-3 else 0
            )  # the greater rate is the better one
        rows = [
            {"problem_id": f"p{i}", "sample_index": k, "stop": "stop", "num_tokens": 5,
             "verdict": "correct" if (i * 3 + settings.seed + k) % 10 < level else "incorrect"}
            for i in range(10) for k in range(2)
        ]  # fmt: skip
        path = run / "evaluations" / checkpoint / f"{data}.samples.jsonl"
        if not path.exists():
            rundir.append_jsonl(path, [{"header": True}, *rows])


def runner(
    folder: Path, children: Any, out: str = "out", text: str = STUDY, results: Path | None = None
) -> Runner:
    path = write_study(folder, text)
    return Runner(study=load_study(path), where=path, out=folder / out, launch=children, workers=2, results=results,
                  say=lambda text: None)  # fmt: skip


def analysed(r: Runner) -> dict[str, Any]:
    found = run_cells(r)
    tuning = tuning_cost(r, r.study.arms)
    return results(r.study, found, tuning=tuning, failures=r.failures, base=base_identity(r))


def test_what_cells_share_is_trained_once(tmp_path: Path) -> None:
    children = Children()
    table = analysed(runner(tmp_path, children))
    assert table["complete"]
    assert set(children.trained.values()) == {1}
    assert children.trained["sft-s1-lr0.01"] == 1  # four arms start from it
    assert {name for name in children.trained if name.startswith("rl-s1-")} == {
        "rl-s1-lr0.002",
        "rl-s1-lr0.002-coin",
    }
    assert (tmp_path / "out/base/model/model.safetensors").is_file()


def test_trials_choose_the_rate_and_are_counted(tmp_path: Path) -> None:
    children = Children()
    table = analysed(runner(tmp_path, children))
    arms = {a["name"]: a for a in table["arms"]}
    assert arms["sft-rl"]["tuning"]["factor"] == 2.0
    assert arms["sft-rl"]["tuning"]["trials"] == arms["sft"]["tuning"]["trials"] == 2
    assert arms["sft"]["tuning"]["flops"]["paper"] == 2 * 10 * 100
    assert arms["sft-rl"]["tuning"]["flops"]["paper"] == 2 * 3 * 500 + 2 * 10 * 100  # and its sft's trials
    assert children.trained["rl-s1-lr0.002"] >= 1
    assert "rl-s1-lr0.001" not in children.trained
    assert arms["rejection"]["marks"][0] == "untuned: one rate is enough here"
    assert arms["base"]["tuning"]["trials"] == 0


def test_continued_sft_spends_what_rl_has_spent(tmp_path: Path) -> None:
    table = analysed(runner(tmp_path, Children()))
    arms = {a["name"]: a for a in table["arms"]}
    assert arms["sft-rl"]["flops"]["paper"] == 10 * 100 + 3 * 500
    assert arms["continued"]["flops"]["paper"] == arms["sft-rl"]["flops"]["paper"]
    assert arms["continued"]["differs"] == {"sft.steps": ["10", "1"]}
    assert not any(m.startswith("budget") for m in arms["continued"]["marks"])
    assert any(m.startswith("budget 0.40x") for m in arms["sft"]["marks"])


def test_the_table_says_how_the_last_stage_chose_its_weights(tmp_path: Path) -> None:
    r, said = runner(tmp_path, Children()), list[str]()
    r.say = said.append
    found = run_cells(r)
    for cell in found.values():
        cell["best"] = {"sft": {"step": 3, "loss": 0.5}}
    for name in ("coin-s1", "coin-s2"):
        found[name]["best"] = {"rl": {"step": 3, "score": 0.5}}
    table = results(r.study, found, tuning={}, failures={})
    named = {arm["name"]: arm["checkpoint"] for arm in table["arms"]}
    assert named["sft"] == "lowest validation loss"
    assert named["coin"] == "best on dev"
    assert named["sft-rl"] == named["base"] == "last"  # their last stage has no select_best
    (line,) = (line for line in said if line.startswith("sft-s1: done"))
    assert line.endswith(f"): {r.out / 'cells' / found['sft-s1']['key'] / 'run'}")


@pytest.mark.parametrize("stop_after", [0, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 9, 15))])
def test_an_interrupted_study_ends_as_if_it_had_not_been(tmp_path: Path, stop_after: int) -> None:
    first = Children()
    whole = analysed(runner(tmp_path, first, "whole"))
    cut = Children(stop_after=stop_after)
    with pytest.raises(RuntimeError, match="killed"):
        analysed(runner(tmp_path, cut, "cut"))
    again = Children()
    assert json.dumps(analysed(runner(tmp_path, again, "cut"))) == json.dumps(whole)
    assert len(again.orders) + stop_after == len(first.orders)  # nothing that was finished is done again
    third = Children()
    analysed(runner(tmp_path, third, "cut"))
    assert third.orders == []


def test_a_failed_cell_is_a_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    r = runner(tmp_path, Children(fail="rejection-s2"))
    table = analysed(r)
    assert list(table["failures"]) == ["rejection-s2"]
    assert "does not want to" in table["failures"]["rejection-s2"]
    assert not table["complete"]
    arm = next(a for a in table["arms"] if a["name"] == "rejection")
    assert arm["seeds"] == [1]
    assert "1 of 2 seeds" in arm["marks"]
    contrast = next(c for c in table["contrasts"] if c["b"] == "rejection")
    assert contrast["seeds"] == [1]
    assert "one seed" in contrast["verdict"]
    assert analysed(runner(tmp_path, Children()))["complete"]  # the next sitting tries it again


def test_committed_cells_are_not_run_again(tmp_path: Path) -> None:
    first = runner(tmp_path, Children())
    whole = analysed(first)
    kept = tmp_path / "kept"
    for kind, made in (("cells", run_cells(first)), ("trials", first.trials)):
        for name, cell in made.items():
            write_cell(kept / kind / f"{name}.json", cell)
    children = Children()
    table = analysed(runner(tmp_path, children, "elsewhere", results=kept))
    assert children.orders == []
    assert json.dumps(table) == json.dumps(whole)
    more = STUDY.replace("seeds = [1, 2]", "seeds = [1, 2, 3]")
    another = analysed(runner(tmp_path, children, "elsewhere", text=more, results=kept))
    assert {int(s) for a in another["arms"] for s in a["seeds"]} == {1, 2, 3}
    assert all("-s1-" not in name and "-s2-" not in name for name in children.trained)


def test_other_settings_are_other_cells(tmp_path: Path) -> None:
    analysed(runner(tmp_path, Children()))
    children = Children()
    analysed(runner(tmp_path, children, text=STUDY.replace("steps = 3\n", "steps = 4\n")))
    assert children.trained["sft-s1-lr0.01"] == 0  # the shared checkpoint is as it was
    assert any(name.startswith("rl-s1-") for name in children.trained)
    base = Children()
    path = write_study(tmp_path)
    (tmp_path / "base.toml").write_text(
        (tmp_path / "base.toml").read_text().replace("limit = 30", "limit = 31")
    )
    r = Runner(
        study=load_study(path), where=path, out=tmp_path / "out2", launch=base, workers=2, say=lambda t: None
    )
    run_cells(r)
    assert (
        base.trained["sft-s1-lr0.01"] + base.trained["sft-s1-lr0.02"] == 1
    )  # another base, another checkpoint


def test_no_two_children_in_one_folder(tmp_path: Path) -> None:
    """The lock is the child's own: whoever comes second waits for it, also after the first study has died."""
    import fcntl
    import threading

    from truestep.study.processes import start

    study = tmp_path / "s"
    (study / "cells").mkdir(parents=True)
    order = Order(study=str(study), recipe="none.toml", run="cells/run")
    ended: list[int] = []
    with (study / "cells/run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: ended.append(start(order)[0]))
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
        assert not (study / "cells/run.log").exists()
    thread.join(120)
    assert ended == [2]  # no such recipe


def test_ctrl_c_starts_no_more_children_and_is_no_failure(tmp_path: Path) -> None:
    children = Children()

    def launch(order: Order) -> tuple[int, str]:
        if len(children.orders) < 6:
            return children(order)
        children.orders.append(order.run)
        signal.raise_signal(signal.SIGINT)  # Python hands it to the main thread
        time.sleep(0.5)
        return 130, "interrupted by SIGINT"

    said: list[str] = []
    r = runner(tmp_path, launch)
    r.say = said.append
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        found = run_cells(r)
    finally:
        signal.signal(signal.SIGINT, before)
    assert r.stopped.is_set()
    assert r.failures == {}
    assert len(children.orders) <= 6 + r.workers  # those at work when it came, and no more
    assert 0 < len(found) < len(run_cells(runner(tmp_path, Children(), "all")))
    assert [line for line in said if "FAILED" in line] == []
    assert analysed(runner(tmp_path, Children())) == analysed(runner(tmp_path, Children(), "all"))


def test_a_cell_file_reads_back(tmp_path: Path) -> None:
    cell = {"arm": "a", "benchmarks": {"t": {"correct": "1 0"}}, "x": [1.5, None], "text": "é\n"}
    write_cell(tmp_path / "c.json", cell)
    assert rundir.read_json(tmp_path / "c.json") == cell
    assert len((tmp_path / "c.json").read_text().splitlines()) == len(cell) + 2


def test_the_recipe_of_a_cell_is_complete(tmp_path: Path) -> None:
    r = runner(tmp_path, Children())
    run_cells(r)
    for path in (tmp_path / "out/cells").glob("*/recipe.toml"):
        raw = tomllib.loads(path.read_text())
        assert raw["compute"]["threads"] == 1
        assert raw["model"]["path"] == "./base/model"


def with_arm(text: str, arm: str, before: str = "base") -> str:
    place = f'[[arms]]\nname = "{before}"'
    assert place in text
    return text.replace(place, f"[[arms]]\n{arm}\n{place}")


def test_a_base_of_another_recipe_is_refused(tmp_path: Path) -> None:
    analysed(runner(tmp_path, Children()))
    again = runner(tmp_path, Children())
    (tmp_path / "base.toml").write_text(
        (tmp_path / "base.toml").read_text().replace("steps = 120", "steps = 121")
    )
    with pytest.raises(UserError, match=r"was trained from a different base\.toml"):
        analysed(again)


def test_a_file_with_other_content_makes_other_cells(tmp_path: Path) -> None:
    generated = STUDY[STUDY.index("[run.data.test]") : STUDY.index("[run.evaluate]")]
    text = STUDY.replace(generated, '[run.data.test]\nsource = "test.jsonl"\n\n')
    (tmp_path / "test.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    first, second, third = Children(), Children(), Children()
    whole = analysed(runner(tmp_path, first, text=text))
    assert analysed(runner(tmp_path, second, text=text)) == whole
    assert second.orders == []
    (tmp_path / "test.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n')
    analysed(runner(tmp_path, third, text=text))
    assert len(third.orders) == len(first.orders) - 1  # the base has met no such file


def test_a_kept_file_that_cannot_be_read_is_run_again(tmp_path: Path) -> None:
    r = runner(tmp_path, Children())
    for name, made in run_cells(r).items():
        write_cell(tmp_path / "kept/cells" / f"{name}.json", made)
    (tmp_path / "kept/cells/sft-s2.json").write_text('{"key": "4')
    (tmp_path / "kept/cells/sft-s1.json").write_text("[]")
    assert analysed(runner(tmp_path, Children(), "out2", results=tmp_path / "kept"))["complete"]


def test_a_thread_that_ends_unseen_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truestep.study.run.match_flops", lambda *given: {}["nothing"])
    monkeypatch.setattr("threading.excepthook", lambda given: None)
    r = runner(tmp_path, Children())
    assert run_cells(r) == {}
    assert len(r.failures) == 12


def test_a_failed_trial_is_a_rate_that_is_not_chosen(tmp_path: Path) -> None:
    r = runner(tmp_path, Children(fail="rl-s11-lr0.002"))
    table = analysed(r)
    arms = {a["name"]: a for a in table["arms"]}
    assert table["complete"]
    assert arms["sft-rl"]["tuning"]["factor"] == 1.0
    assert "rates whose trials failed: 2" in arms["sft-rl"]["marks"]
    assert sorted(r.failures) == ["coin.lr2-s11", "sft-rl.lr2-s11"]
    every = runner(tmp_path, Children(fail="rl-s11"), "out2")
    table = analysed(every)
    assert {name for name in table["failures"] if "lr" not in name} == {
        f"{arm}-s{seed}" for arm in ("sft-rl", "coin", "continued") for seed in (1, 2)
    }
    assert "all its learning-rate trials have failed" in table["failures"]["sft-rl-s1"]


def test_every_stage_has_the_rate_that_the_arm_which_ends_there_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = with_arm(STUDY, 'name = "sft-more"\nstages = ["sft", "more"]')
    text = with_arm(text, 'name = "three"\nstages = ["sft", "more", "rl"]')
    chosen = {"sft": 2.0, "sft-more": 0.5}
    monkeypatch.setattr("truestep.study.run.chosen_factor", lambda runner, arm: chosen[arm])
    rates = [
        table["optimizer"]["lr"] for table in tables_of(runner(tmp_path, Children(), text=text), "three")
    ]
    assert rates == [2e-2, 5e-3, 1e-3]


def test_an_arm_with_matched_steps_owns_no_rate_and_waits_for_nobody(tmp_path: Path) -> None:
    """It stands first, consists of the others' first stage, and is matched with an arm that begins with
    it."""
    again = 'name = "again"\nstages = ["sft"]\nequal_flops = { to = "sft-rl", step_like = "sft" }'
    table = analysed(runner(tmp_path, Children(), text=with_arm(STUDY, again)))
    arms = {a["name"]: a for a in table["arms"]}
    assert table["complete"]
    assert arms["again"]["flops"]["paper"] == arms["sft-rl"]["flops"]["paper"]
    assert arms["sft-rl"]["tuning"]["flops"]["paper"] == 2 * 3 * 500 + 2 * 10 * 100  # its sft's trials, once


def test_a_budget_is_matched_from_what_the_arm_itself_has_spent(tmp_path: Path) -> None:
    long = 'name = "long"\nstages = ["sft", "more"]\nset = { "sft.steps" = 20 }\n'
    long += 'equal_flops = { to = "sft-rl", step_like = "sft" }'
    table = analysed(runner(tmp_path, Children(), text=with_arm(STUDY, long)))
    arms = {a["name"]: a for a in table["arms"]}
    assert arms["long"]["flops"]["paper"] == arms["sft-rl"]["flops"]["paper"] == 20 * 100 + 5 * 100
    assert "not tuned, because no arm ends with it: sft" in arms["long"]["marks"]
    assert not any("not tuned" in mark for mark in arms["sft-rl"]["marks"])


def test_a_primary_contrast_without_cells_is_one_of_the_family(tmp_path: Path) -> None:
    pair = 'primary = [["sft-rl", "sft"]]'
    r = runner(
        tmp_path,
        Children(),
        text=STUDY.replace(pair, 'primary = [["sft-rl", "sft"], ["sft-rl", "rejection"]]'),
    )
    found = {name: cell for name, cell in run_cells(r).items() if not name.startswith("rejection")}
    made = results(r.study, found, tuning={}, failures={})["contrasts"][0]
    assert made["p_adjusted"] == pytest.approx(min(1.0, 2 * made["all"]["p_value"]))


def test_a_model_and_data_named_from_here_or_from_the_study_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/model").mkdir(parents=True)
    (tmp_path / "there/other").mkdir(parents=True)
    (tmp_path / "here/test.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    settings = load_settings(write_study(tmp_path / "there").parent / "base.toml")
    for path, place in (("./model", "here/model"), ("./other", "there/other"), ("./base/model", None)):
        data = {"test": settings.data["easy"].model_copy(update={"source": "test.jsonl"})}
        model = settings.model.model_copy(update={"path": path})
        found = with_absolute_paths(
            settings.model_copy(update={"data": data, "model": model}), tmp_path / "there"
        )
        assert found.data["test"].source == str(tmp_path / "here/test.jsonl")
        assert found.model.path == (str(tmp_path / place) if place else path)


def test_a_cell_is_tracked_by_the_studys_file_in_the_studys_group(tmp_path: Path) -> None:
    tracked = STUDY.replace(
        "[run.model]", '[run]\ntrackers = ["mine.py:Mine", "pkg.mod:Mine"]\n[run.model]', 1
    )
    run_cells(runner(tmp_path / "there", Children(), text=tracked))
    recipes = [load_settings(path) for path in (tmp_path / "there").rglob("cells/*/recipe.toml")]
    assert recipes
    for recipe in recipes:
        assert recipe.group == "micro"
        assert recipe.trackers == (f"{tmp_path}/there/mine.py:Mine", "pkg.mod:Mine")
    assert len({recipe.name for recipe in recipes}) == len(recipes)


def test_code_of_a_recipe_is_found_from_anywhere_and_is_part_of_a_cell(tmp_path: Path) -> None:
    """The row's content, not its place, makes another cell."""
    (tmp_path / "row.py").write_text("def mine(): ...\n")
    (tmp_path / "reward.py").write_text("def mine(samples): ...\n")
    settings = load_settings(write_study(tmp_path).parent / "base.toml")
    stage = RlSettings(
        kind="rl", name="rl", data="easy", steps=1, prompts_per_step=2, tokens_per_microbatch=64,
        optimizer=OptimizerSettings(lr=1.0), sampling=SamplingSettings(max_new_tokens=4),
        method="row.py:mine", reward="reward.py:mine",
    )  # fmt: skip
    settings = settings.model_copy(update={"stages": (stage,)})
    (found,) = with_absolute_paths(settings, tmp_path).stages
    assert isinstance(found, RlSettings)
    assert (found.method, found.reward) == (f"{tmp_path}/row.py:mine", f"{tmp_path}/reward.py:mine")
    before = code_of(stage, tmp_path)
    assert set(before) == {"row.py:mine", "mine"}
    for name in ("row.py", "reward.py"):
        (tmp_path / name).write_text("# another\n" + (tmp_path / name).read_text())
        after = code_of(stage, tmp_path)
        assert after != before
        before = after


class Quick:
    """A child process that has ended as soon as it is started; who asks for its end must be alone."""

    def __init__(self, target: Any, args: Any) -> None:
        self.sentinel, ended = os.pipe()
        os.close(ended)
        self.exitcode = 0

    def start(self) -> None:
        assert processes.ONE_AT_A_TIME.locked()

    def join(self) -> None:
        assert processes.ONE_AT_A_TIME.locked()


def test_exit_codes_are_read_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads that read the end of one child the second finds nothing: exit code 255 of one that was
    well."""
    monkeypatch.setattr(processes, "_forks", lambda: SimpleNamespace(Process=Quick))
    (tmp_path / "run.log").write_text("said\n")
    assert processes.start(Order(study=str(tmp_path), recipe="r", run="run")) == (0, "said")


def test_a_process_that_ends_before_it_has_a_log_has_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_forks", lambda: SimpleNamespace(Process=Quick))
    assert processes.start(Order(study=str(tmp_path), recipe="r", run="run")) == (0, "")
