"""Reward functions that fail in every way there is: nothing stops, no sample is lost, every other one is scored."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reward_samples import same_text, sample

from truestep.errors import UserError
from truestep.records import RewardInput, Score, Stop
from truestep.reward_settings import RewardSettings
from truestep.rewards.pool import OUTPUT_TAIL, processes
from truestep.rewards.scorer import RewardScorer
from truestep.user_code import MAX_DETAIL

BAD = 13  # the sample that the function fails on

HOSTILE = {
    "raise": "raise ValueError('boom')",
    "hang": "time.sleep(3600)",
    "busy": "\n        while True: pass",
    "nan": "value = float('nan')",
    "inf": "value = float('inf')",
    "huge": "value = 10**5000",
    "text": "value = 'good'",
    "list": "value = [1.0]",
    "none_in_parts": "value = {'a': None}",
    "nan_in_parts": "value = {'a': float('nan')}",
    "empty_parts": "value = {}",
    "bad_key": "value = {'a b\\n': 1.0}",
    "error_object": "value = RuntimeError('the server said no')",
    "gigabyte": "global kept; kept = b'x' * (1 << 30); time.sleep(3600)",
    "child_gigabyte": "\n        if os.fork() == 0: kept = b'x' * (1 << 30); time.sleep(3600)\n        time.sleep(3600)",
    "exit": "sys.exit(3)",
    "os_exit": "print('last words', flush=True); os._exit(3)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "recursion": "f = lambda n: f(n + 1); f(0)",
    "interrupt": "raise KeyboardInterrupt",
    "bad_str": "\n        class Odd(Exception):\n            def __str__(self): raise ValueError\n        raise Odd",
    "close_all": "os.closerange(0, 1000)",
    "swarm": "\n        for _ in range(6): os.fork()\n        time.sleep(3600)",
}
SAID = {
    "raise": "ValueError: boom", "hang": "timeout_seconds = 3", "nan": "returned nan", "huge": "returned inf",
    "text": "expected a number, None or a mapping of numbers (",
    "gigabyte": "memory_mb = 300", "os_exit": "exit status 3", "killed": "signal 9", "exit": "SystemExit: 3",
}  # fmt: skip
LIMITS: dict[str, dict[str, Any]] = {kind: {"timeout_seconds": 3.0} for kind in ("hang", "busy")}
HARMLESS = {
    "print": "print('y' * 300_000); print('z' * 1000, file=sys.stderr)",
    "fork_returns": "os.fork()",
    "fork_exits": "\n        if os.fork() == 0: sys.exit(1)",
    "session_of_its_own": "\n        if os.fork() == 0: os.setsid(); time.sleep(3600)",
    "child_stays": "\n        if os.fork() == 0: time.sleep(3600)",
    "thread_stays": "threading.Thread(target=time.sleep, args=(3600,)).start()",
    "chdir": "os.chdir('/')",
    "stdin": "assert sys.stdin.read() == ''",
}


def write(folder: Path, body: str) -> Path:
    path = folder / "reward.py"
    path.write_text(
        "import os, signal, sys, threading, time\n"
        "def score(samples):\n"
        "    out = []\n"
        "    for sample in samples:\n"
        "        value = float(sample.problem.columns['level'])\n"
        f"        if sample.problem.id == 'p{BAD}':\n            {body.replace(chr(10), chr(10) + '    ')}\n"
        "        out.append(value)\n"
        "    return out\n"
    )
    return path


@contextmanager
def opened(folder: Path, **entry: Any) -> Iterator[RewardScorer]:
    entry = {"function": "reward.py:score", "timeout_seconds": 60.0, "memory_mb": 300, **entry}
    with RewardScorer(
        [RewardSettings(**entry)], grade=same_text, base=folder, folder=folder / "run"
    ) as scorer:
        yield scorer


def others_scored(results: list[Score], samples: list[RewardInput]) -> bool:
    return all(
        r.reward == float(s.problem.columns["level"]) and not r.failed
        for r, s in zip(results, samples, strict=True)
        if s.problem.id != f"p{BAD}"
    )


MARK = f"TRUESTEP_TEST_{os.getpid()}"


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "1")


def started() -> set[int]:
    """All processes that came from this test, whoever their parent is by now."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MARK.encode() in (path / "environ").read_bytes():  # empty for one that has ended
                found.add(int(path.name))
    return found


@pytest.mark.parametrize("kind", HOSTILE)
def test_one_bad_sample_takes_no_other_with_it(tmp_path: Path, kind: str) -> None:
    write(tmp_path, HOSTILE[kind])
    samples = [sample(n) for n in range(25)]
    with opened(tmp_path, **LIMITS.get(kind, {})) as scorer:
        results = scorer.score(samples)
        assert len(results) == 25
        assert others_scored(results, samples)
        bad = results[BAD]
        assert bad.failed
        assert bad.reward is None
        assert bad.reason.startswith("score: ")
        assert len(bad.reason) > 15
        assert SAID.get(kind, "") in bad.reason
        assert "score" not in bad.parts
        again = [sample(n, step=1) for n in range(100, 110)]
        assert others_scored(scorer.score(again), again), "the function is still there"
    assert started() == set(), "everything that it started has ended"


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_a_function_may_do(tmp_path: Path, kind: str) -> None:
    write(tmp_path, HARMLESS[kind])
    samples = [sample(n) for n in range(25)]
    with opened(tmp_path) as scorer:
        results = scorer.score(samples)
        assert [r.reward for r in results] == [float(n) for n in range(25)]
        assert not any(r.failed for r in results)
        assert started() != set()
        assert [r.reward for r in scorer.score(samples[::-1])] == [float(n) for n in range(25)][::-1]
        assert scorer.score([sample(30)])[0].reward == 30
    assert started() == set()


@pytest.mark.parametrize(("bad", "of", "share", "stops"), [
    (1, 20, 0.05, False), (2, 20, 0.05, True), (3, 60, 0.05, False), (4, 60, 0.05, True),
    (29, 100, 0.29, False), (30, 100, 0.29, True), (1, 20, 0.0, True), (0, 20, 0.0, False),
    (20, 20, 1.0, False), (19, 19, 0.05, False),
])  # fmt: skip
def test_the_share_of_failures_that_stops_a_run(
    tmp_path: Path, bad: int, of: int, share: float, stops: bool
) -> None:
    write(tmp_path, "raise ValueError('boom')")
    samples = [sample(BAD if n < bad else 100 + n) for n in range(of)]
    with opened(tmp_path, max_failure_share=share) as scorer:
        if not stops:
            assert sum(r.failed for r in scorer.score(samples)) == bad
            return
        with pytest.raises(UserError) as caught:
            scorer.score(samples)
    message = str(caught.value)
    assert f"failed on every sample that was tried ({bad} of {of} samples, step 1)" in message
    assert f"max_failure_share = {share:g}" in message
    assert "raise ValueError('boom')" in message, "the function's own line"
    assert 'reward.py", line 7, in score' in message
    assert "truestep/rewards" not in message, "and none of ours"


@pytest.mark.parametrize(("body", "said"), [
    ("[1.0]", "returned 1 value; expected a list with one value for each of 24 samples"),
    ("(1.0 for s in samples[1:])", "returned 23 values"), ("{s.problem.id: 1.0 for s in samples}", "returned dict"),
])  # fmt: skip
def test_a_wrong_number_of_values_is_a_fault_of_the_function(tmp_path: Path, body: str, said: str) -> None:
    """Alone, every sample would get a list of length 1, which fits."""
    (tmp_path / "reward.py").write_text(f"\ndef score(samples):\n    return {body}\n")
    samples = [sample(n) for n in range(24)]
    with opened(tmp_path) as scorer, pytest.raises(UserError) as caught:
        scorer.score(samples)
    assert "failed on every sample that was tried (24 of 24 samples, step 1)" in str(caught.value)
    assert f"first failure: {said}" in str(caught.value)
    assert "reward.py, line 2, in score)" in str(caught.value)


def test_one_value_for_each_sample_is_right_in_any_sequence(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def score(samples): return (1.0 for s in samples)\n")
    with opened(tmp_path, max_failure_share=0.0) as scorer:
        assert [r.reward for r in scorer.score([sample(n) for n in range(24)])] == [1.0] * 24


def test_a_function_that_fails_on_all_is_said_to_fail_on_all(tmp_path: Path) -> None:
    """The retry ends after few samples; the message does not say that only these are bad."""
    (tmp_path / "reward.py").write_text("def score(samples):\n    raise ValueError('boom')\n")
    with opened(tmp_path) as scorer, pytest.raises(UserError) as caught:
        scorer.score([sample(n) for n in range(48)])
    told = "failed on every sample that was tried (3 of 48 samples, step 1)"
    assert told in str(caught.value)
    assert "so the run stops; the first failure (p0): ValueError: boom" in str(caught.value)
    assert "reward.py, line 2, in score)" in str(caught.value)


def test_small_steps_are_counted_together(tmp_path: Path) -> None:
    """8 samples a step, all bad: the third step makes 24. Then a good step of 30 begins a new count."""
    write(tmp_path, "raise ValueError('boom')")
    with opened(tmp_path) as scorer:
        for step in range(2):
            assert all(r.failed for r in scorer.score([sample(BAD, step=step)] * 8))
        with pytest.raises(UserError, match=r"every sample that was tried \(\d+ of 24"):
            scorer.score([sample(BAD, step=2)] * 8)
        assert not any(r.failed for r in scorer.score([sample(n, step=3) for n in range(100, 130)]))


def test_rounds_of_a_step_are_counted_together(tmp_path: Path) -> None:
    write(tmp_path, "raise ValueError('boom')")
    with opened(tmp_path) as scorer:
        scorer.score([sample(n) for n in range(100, 160)])
        assert sum(r.failed for r in scorer.score([sample(BAD)] * 3)) == 3  # 3 of 63
        row = f"{tmp_path}/rows.jsonl:7"
        bad = sample(BAD)
        bad = replace(bad, problem=replace(bad.problem, row=row))
        with pytest.raises(UserError, match=rf"failed on 4 of 64 .* first failure \(p{BAD}\): ValueError"):
            scorer.score([bad])
    named = pytest.raises(UserError, match=rf"first failure \({row}\): ValueError: boom")
    with opened(tmp_path, max_failure_share=0.0) as scorer, named:
        scorer.score([sample(n) for n in range(100, 140)] + [bad])


def test_a_worker_that_ends_between_two_calls_is_no_failure(tmp_path: Path) -> None:
    write(tmp_path, "threading.Timer(0.2, os._exit, (1,)).start()")
    with opened(tmp_path) as scorer:
        for _ in range(2):
            assert [r.reward for r in scorer.score([sample(BAD)])] == [BAD]
            time.sleep(1.0)


def test_what_a_function_printed_is_shown_without_keys(tmp_path: Path) -> None:
    write(
        tmp_path, "print('before', 'sk-' + 'a' * 20, file=sys.stderr); raise ValueError('key hf_' + 'b' * 20)"
    )
    with opened(tmp_path, max_failure_share=0.0) as scorer, pytest.raises(UserError) as caught:
        scorer.score([sample(BAD), *[sample(n) for n in range(100, 119)]])
    assert "The function printed:\nbefore [redacted]" in str(caught.value)
    assert "ValueError: key [redacted]" in str(caught.value)
    assert "aaaa" not in str(caught.value)
    assert "bbbb" not in str(caught.value)


def test_a_key_across_the_cut_of_what_a_function_said_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "plain-key-of-mine"
    monkeypatch.setenv("MY_API_KEY", key)
    said = "os.environ['MY_API_KEY'] + 'z' * {}"
    write(
        tmp_path,
        f"print({said.format(OUTPUT_TAIL - 9)}, end=''); sys.stdout.flush(); "
        f"raise ValueError('y' * 980 + {said.format(MAX_DETAIL - 9)})",
    )
    with opened(tmp_path, max_failure_share=0.0) as scorer, pytest.raises(UserError) as caught:
        scorer.score([sample(BAD), *[sample(n) for n in range(100, 119)]])
    assert "y" * 980 in str(caught.value)
    assert "z" * (OUTPUT_TAIL - 9) in str(caught.value)
    assert not [n for n in range(len(key) - 5) if key[n : n + 6] in str(caught.value)]


def test_an_unreadable_answer_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "from truestep.rewards.record import Unscored\n"
        "def score(samples): return [None if s.sample % 2 else Unscored('no number') for s in samples]\n"
    )
    with opened(tmp_path) as scorer:
        results = scorer.score([sample(1, sample=n) for n in range(40)])
    assert {(r.reward, r.failed) for r in results} == {(None, False)}
    assert {r.reason for r in results} == {"score: no number", "score: the function returned None"}


def test_a_function_that_hangs_on_all_ends_in_bounded_time(tmp_path: Path) -> None:
    write(tmp_path, "time.sleep(3600)")
    began = time.monotonic()
    with (
        opened(tmp_path, timeout_seconds=0.5) as scorer,
        pytest.raises(UserError, match=r"timeout_seconds = 0\.5"),
    ):
        scorer.score([sample(BAD)] * 64)
    assert time.monotonic() - began < 60
    write(tmp_path, "time.sleep(3600)")
    with opened(tmp_path, timeout_seconds=0.5, max_failure_share=1.0) as scorer:
        results = scorer.score([sample(BAD)] * 64)
    assert [r.failed for r in results] == [True] * 64
    assert "its batch failed" in results[-1].reason


def test_a_sample_without_a_completion_is_not_asked_about(tmp_path: Path) -> None:
    write(tmp_path, "raise ValueError('boom')")
    with opened(tmp_path, max_failure_share=0.0) as scorer:
        lost = [sample(BAD, stop=Stop.ERROR, completion=" ")] * 20
        results = scorer.score([sample(1), *lost, sample(2)])
    assert [r.reward for r in results] == [1.0, *[None] * 20, 2.0]
    assert not any(r.failed for r in results)


def test_state_is_loaded_once_for_each_worker(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "import os\nopen('loads.txt', 'a').write('x')\ncalls = 0\n"
        "def score(samples, folder):\n"
        "    global calls\n    calls += 1\n"
        "    os.makedirs(folder, exist_ok=True)\n    open(folder + '/seen', 'a').write('.')\n"
        "    return [{'calls': calls, 'pid': os.getpid(), 'reward': 0} for _ in samples]\n"
        .replace("'loads.txt'", repr(str(tmp_path / "loads.txt")))
    )  # fmt: skip
    with opened(tmp_path, workers=2, batch_size=5) as scorer:
        results = [r for _ in range(3) for r in scorer.score([sample(n) for n in range(20)])]
    assert len({r.parts["score/pid"] for r in results}) <= 2
    assert max(r.parts["score/calls"] for r in results) >= 6, "12 calls of two workers"
    assert (tmp_path / "loads.txt").read_text() in ("x", "xx")
    assert (tmp_path / "run" / "seen").read_text() == "." * 12


def test_workers_end_with_the_program_that_started_them(tmp_path: Path) -> None:
    """Also if that is killed and can tell nobody, while the function hangs and has a child."""
    write(
        tmp_path,
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{os.fork()}}'); time.sleep(600)",
    )
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
from pathlib import Path
from test_hostile_rewards import opened, sample, BAD
with opened(Path({str(tmp_path)!r}), timeout_seconds=600) as scorer:
    scorer.score([sample(BAD)])
"""
    program = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().strip():
            assert time.monotonic() < until
            assert program.poll() is None
            time.sleep(0.05)
    finally:
        program.kill()
        program.wait()
    worker = int((tmp_path / "pids").read_text().split()[0])
    until = time.monotonic() + 30
    while processes(worker):
        assert time.monotonic() < until
        time.sleep(0.1)
