"""An evaluation gives the same samples on any number of ranks, and goes on with another number of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import Job, lines_in
from tiny_runs import write_recipe

from truestep.pipeline.evaluation import share_of

RECIPE = """
name = "many"
[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 2, num_heads = 2, intermediate_size = 64 }
[compute]
threads = 1
parallel = "ddp"
[data.test]
source = "procedural:addition"
split = "test"
limit = 10
options = { digits = 2 }
[evaluate]
data = ["test"]
samples_per_problem = 3
sampling = { max_new_tokens = 30, temperature = 1.0 }
"""
ONE_BY_ONE = ("--set", "evaluate.sampling.max_running=1")


def start(folder: Path, out: str, world_size: int, *words: str) -> Job:
    recipe = folder / "eval.toml"
    recipe.write_text(RECIPE)
    words = ("eval", str(recipe), "--out", str(folder / out), *words)
    return Job(words, folder / f"{out}-{world_size}", world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_problems", [1, 2, 7])
def test_shares_are_everything_once(world_size: int, num_problems: int) -> None:
    keys = [(f"q{i}", n) for i in range(num_problems) for n in range(4) if (i, n) != (0, 2)]
    shares = [share_of(keys, rank, world_size) for rank in range(world_size)]
    assert sorted(key for share in shares for key in share) == sorted(keys)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 4


def test_samples_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    """Also if three ranks are signalled, two are killed, and one finishes."""
    samples = {}
    for world_size in (1, 3):
        with start(tmp_path, f"whole-{world_size}", world_size) as job:
            assert set(job.end(120).codes) == {0}
        (path,) = (tmp_path / f"whole-{world_size}/evaluations/base").glob("*.samples.jsonl")
        samples[world_size] = path.read_bytes()
    assert len({json.loads(line).get("completion") for line in samples[1].splitlines()}) > 25
    assert samples[3] == samples[1]

    folder = tmp_path / "stopped/evaluations/base"

    def made() -> int:
        return sum(lines_in(path) for path in folder.glob("*.jsonl"))

    with start(tmp_path, "stopped", 3, *ONE_BY_ONE) as job:
        job.wait_for(lambda: made() >= 8)
        job.signal("term", 1)
        assert job.end(20).codes == [143] * 3
    before = made()
    assert len(list(folder.glob("*.unfinished.jsonl"))) == 2
    with start(tmp_path, "stopped", 2, *ONE_BY_ONE, "--resume") as job:
        job.wait_for(lambda: made() >= before + 4)
        assert len(list(folder.glob("*.unfinished.jsonl"))) <= 1, "samples of the first start were not kept"
        job.signal("kill", 0)
        assert job.end(20).codes == [-9, 5]
    with start(tmp_path, "stopped", 1, "--resume") as job:
        assert job.end(120).codes == [0]
    assert (folder / "test.samples.jsonl").read_bytes() == samples[1]
    assert sorted(path.name for path in folder.iterdir()) == ["test.results.json", "test.samples.jsonl"]


def rows(path: Path) -> list[dict[str, Any]]:
    """The samples without the header and the checksums, which have the hash of ``compute.parallel``."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{key: value for key, value in row.items() if key != "checksum"} for row in lines]


REJECTION = """[[stages]]
kind = "rejection"
data = "train"
steps = 4
samples_per_prompt = 4
keep_per_prompt = 2
sequences_per_step = 4
tokens_per_microbatch = 40
dev = { data = "dev", every_steps = 2, samples_per_problem = 3 }
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 3, max_running = 6 }

[[stages]]
kind = "rl"
dev = { data = "dev", every_steps = 2, samples_per_problem = 2, select_best = true }"""
DEV = """[data.dev]
source = "procedural:addition"
split = "test"
skip = 5
limit = 5
options = { digits = 1 }

[[stages]]
kind = "sft"
dev = { data = "dev", every_steps = 7 }"""


@pytest.mark.slow
def test_dev_scores_and_rejection_stages_are_those_of_one_rank(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace('[[stages]]\nkind = "sft"', DEV)
    recipe.write_text(text.replace('[[stages]]\nkind = "rl"', REJECTION))
    for name, world_size in (("auto", 1), ("ddp", 2), ("fsdp2", 3)):
        words = ["run", str(recipe), "--out", str(tmp_path / name), "--set", f"compute.parallel={name}"]
        with Job(words, tmp_path / f"{name}-logs", world_size=world_size) as job:
            ended = job.end(280)
            assert set(ended.codes) == {0}, ended.outputs
    one = tmp_path / "auto"
    found = [p.relative_to(one) for p in one.rglob("*.samples.jsonl")]
    assert sum("dev" in path.parts for path in found) == 7
    for other in ("ddp", "fsdp2"):
        assert {p: rows(tmp_path / other / p) for p in found} == {p: rows(one / p) for p in found}
        kept = "stages/02-rejection/rejection.json"
        assert (tmp_path / other / kept).read_bytes() == (one / kept).read_bytes()
