"""One step off with a real vLLM server: the versions are right, the gap to the
engine is told apart from the change of the policy, and a stopped run goes on. Slow."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_vllm_rl import write_run

from truestep.checkpoint.manifest import newest_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
AHEAD = 'engine = "vllm"\nrollout_ahead = 1\nsave_every = 4\nmethod_options = { correction = "truncate" }'


def test_a_run_is_one_step_off_also_after_a_stop(tmp_path: Path) -> None:
    # Older samples, so a smaller rate than in the run in sequence.
    command, told = write_run(tmp_path, ('engine = "vllm"', AHEAD), ("lr = 2e-3", "lr = 1e-3"))
    stage = tmp_path / "run/stages/02-rl"
    first = subprocess.Popen(command, env=told, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 900
    while first.poll() is None and time.monotonic() < until:
        if (stage / "metrics.jsonl").exists() and len(
            (stage / "metrics.jsonl").read_text().splitlines()
        ) >= 6:
            first.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    said = first.communicate(timeout=300)[1]
    assert first.returncode == 143, said[-2000:]
    state = newest_state(stage / "checkpoints")
    assert state is not None
    waits = "waiting" in state
    second = subprocess.Popen([*command, "--resume"], env=told, stderr=subprocess.PIPE, text=True)
    said = second.communicate(timeout=900)[1]
    assert second.returncode == 0, said[-2000:]
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").open()]
    ages = [row["rl/sampling/staleness"] for row in rows]
    gaps = [row["rl/sampling/logprob_difference_max"] for row in rows]
    changes = [row["rl/sampling/policy_change_mean"] for row in rows]
    rewards = [row["rl/reward"] for row in rows]
    print(
        "stopped after", state["step"], "with waiting groups" if waits else "without", rewards, gaps, changes
    )
    fresh = {0} if waits else {0, int(state["step"])}
    assert ages == [float(step not in fresh) for step in range(24)]
    assert max(gaps) < 1e-3, "float32's noise, although the policy moves"
    assert max(changes) > 10 * max(gaps)
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.1, "it learns from older samples"
    for one in (first, second):
        assert not list(Path("/dev/shm").glob(f"truestep-weights-{one.pid}-*")), "nothing is left behind"
