"""A first Ctrl-C is answered while the work goes on; a second one stops it, and the last finished step is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contract"))

from tiny_runs import write_recipe

from truestep import signals
from truestep.cli.progress import ConsoleReporter
from truestep.rundir import read_jsonl
from truestep.signals import Interrupted

# A method that hangs once, in the first micro-batch of the third step.
HANGING = """
import time
from dataclasses import replace
from pathlib import Path

from truestep.objective.methods import METHODS

FLAG = Path(__file__).with_name("hung")


def row(**options):
    method = METHODS["sft"](**options)
    (term,) = method.terms

    def hanging(context):
        if context.step == 2 and not FLAG.exists():
            FLAG.touch()
            time.sleep(600)
        return term.coefficient(context)

    return replace(method, terms=(replace(term, coefficient=hanging),))
"""
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_first_is_answered_and_the_second_keeps_the_last_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe")
    (recipe.parent / "own.py").write_text(HANGING)
    words = [
        "sft",
        str(recipe),
        "--set",
        "stages.sft.method=own.py:row",
        "--set",
        "evaluate.data=[]",
        "--out",
    ]

    def start(folder: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "truestep", *words, str(folder), *more]
        return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=-1, stderr=-1)

    run, stage = tmp_path / "run", tmp_path / "run/stages/01-sft"
    process = start(run)
    try:
        assert process.stderr is not None
        while not (recipe.parent / "hung").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        answer = next(line for line in process.stderr if "again" in line)
        assert answer == "SIGINT: stopping in sft, 3/14 and saving; again to stop now\n"
        assert process.poll() is None, "it hangs still"
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "all finished work is saved. Continue with: truestep sft" in rest
    assert (stage / "checkpoints/latest").read_text().strip() == "step_00000002"
    process = start(run, "--resume")
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    assert [row["step"] for row in read_jsonl(stage / "metrics.jsonl")] == list(range(1, 15))


def test_a_second_signal_waits_for_a_state_that_can_be_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with signals.deferred(lambda: "in step 2"):
        signals.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        kept = True  # both have been noted, and nothing was interrupted
        with pytest.raises(Interrupted):
            signals.release()
    assert kept
    said = capfd.readouterr().err
    assert "SIGINT: stopping in step 2 and saving; again to stop now" in said
    assert "stopping as soon as this step is kept" in said
    with signals.deferred(), pytest.raises(Interrupted, match="SIGTERM"):
        twice(signal.SIGTERM)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest may ignore it
    try:
        with signals.deferred(is_alone=False), pytest.raises(KeyboardInterrupt):
            twice(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_place_before_any_work_has_a_name() -> None:
    reporter = ConsoleReporter()
    assert reporter.place("stage") == "before the first stage"
    assert reporter.place() == "before the first evaluation"
    reporter.begin("sft", 14, 2, head="loss")
    assert reporter.place("stage") == "in sft, 3/14"


def twice(signum: signal.Signals) -> None:
    for _ in range(2):
        signal.raise_signal(signum)


def test_a_step_outside_of_a_stage_holds_nothing() -> None:
    """A step that was made alone does not make a later second signal wait."""
    signals.hold()
    with signals.deferred(), pytest.raises(Interrupted):
        twice(signal.SIGTERM)
