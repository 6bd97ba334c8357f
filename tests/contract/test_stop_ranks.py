"""A signal to any rank stops all of them at the same place, also within a step and a rollout."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_jobs import Job

WITHIN = 20.0  # seconds; torchrun kills its processes 30 s after SIGTERM


@pytest.mark.parametrize("signalled", [(0,), (2,), (0, 1, 2)])
def test_ranks_stop_after_the_same_micro_batch(signalled: tuple[int, ...], tmp_path: Path) -> None:
    with Job(["worker", "micro_batches", str(tmp_path)], tmp_path, world_size=3) as job:
        job.wait_for(job.ready)
        job.signal("term", *signalled)
        ended = job.end(WITHIN)
    assert ended.codes == [143] * 3
    said = {output.strip() for output in ended.outputs}
    assert len(said) == 1, said
    assert "stopped after" in said.pop()


def test_ranks_leave_a_long_rollout_together(tmp_path: Path) -> None:
    with Job(["worker", "rollout", str(tmp_path)], tmp_path) as job:
        job.wait_for(lambda: "finished 0" in job.outputs()[1])
        job.signal("term", 0)  # which has finished its own samples
        ended = job.end(WITHIN)
    assert ended.codes == [143, 143]
    assert all("finished 1" not in output for output in ended.outputs)
