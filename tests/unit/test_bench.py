"""``make bench``: its workload and its micro-batches fit by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from truestep.rundir import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench

    return bench


def rows(*lengths: int) -> dict[str, Any]:
    return {"rows": [{"ids": [3 + i % 50 for i in range(n)], "num_prompt": n // 2} for n in lengths]}


@pytest.mark.parametrize("section", ["sft", "rl", "matmul"])
def test_a_micro_batch_holds_the_longest_sequence(bench: Any, section: str) -> None:
    sizes = bench.Sizes()
    workload = rows(50, 1332) if section != "rl" else {"prompts": [{"ids": [1] * 1300}]}
    needed = 1332 if section != "rl" else 1300 + sizes.rl_tokens
    seen = [bench.fitted(c, workload).spec for c in bench.CONTESTANTS[section](sizes)]
    batches = [spec["tokens_per_microbatch"] for spec in seen if "tokens_per_microbatch" in spec]
    assert batches
    assert set(batches) == {needed}
    for contestant in bench.CONTESTANTS[section](sizes):  # and nothing changes if they hold it already
        short = rows(5) if section != "rl" else {"prompts": [{"ids": [1]}]}
        assert bench.fitted(contestant, short) == contestant


@pytest.mark.slow
def test_our_sft_runs_with_a_row_longer_than_the_default_micro_batch(bench: Any, tmp_path: Path) -> None:
    """The contestant's own process, as ``make bench`` starts it."""
    sizes = bench.Sizes(sft_steps=1, sequences_per_step=2, sft_tokens_per_microbatch=30)
    workload = rows(*[40, 20] * 4)
    write_json(tmp_path / "workload.json", workload)
    ours = bench.fitted(bench.CONTESTANTS["sft"](sizes)[0], workload)
    spec = {
        "model": "tiny",
        "dtype": "float32",
        "threads": 1,
        "seed": 0,
        "workload": str(tmp_path / "workload.json"),
    }
    line = bench.run_contestant(ours, {**spec, **ours.spec}, tmp_path, 120)
    assert line["figures"]["tokens_per_second"] > 0
