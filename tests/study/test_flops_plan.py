"""The ledger of a real run is the formula on its own token counts, worked out from lengths alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from truestep import rundir
from truestep.data.chat import encode_prompt
from truestep.flops import Ledger, group_work, sequence_work
from truestep.pipeline.prepare import prepare
from truestep.pipeline.run import open_run_folder
from truestep.pipeline.run import run as run_pipeline
from truestep.seeding import permutation
from truestep.settings import load_settings
from truestep.train.parallel import Ranks

RECIPE = """
name = "ledger"
model = { path = "tiny", tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 } }
compute = { threads = 1 }
data.train = { source = "procedural:addition", limit = 12, options = { digits = 1 } }
[[stages]]
kind = "sft"
data = "train"
steps = 6
sequences_per_step = 8
tokens_per_microbatch = 400
optimizer = { lr = 2e-2 }
[[stages]]
kind = "rl"
data = "train"
steps = 3
prompts_per_step = 4
samples_per_prompt = 4
updates_per_rollout = 2
tokens_per_microbatch = 4000
optimizer = { lr = 1e-3 }
sampling = { max_new_tokens = 24, max_running = 64 }
"""


class Silent:
    def say(self, text: str) -> None:
        pass

    def begin(self, what: str, total: int, done: int = 0, head: str = "") -> None:
        pass

    def advance(self, done: int, note: str = "") -> None:
        pass


def test_the_ledger_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group is watched as it is sampled; the lengths alone must give the ledger of both stages."""
    from truestep.rollout import sample

    groups: list[list[tuple[int, list[int]]]] = []
    inner = sample.Sampler.groups

    def watched(self, *args, **more):  # type: ignore[no-untyped-def]
        made = inner(self, *args, **more)
        groups.append([(len(g.prompt.token_ids), [len(r.completion_ids) for r in g.rollouts]) for g in made])
        return made

    monkeypatch.setattr(sample.Sampler, "groups", watched)
    recipe = tmp_path / "run.toml"
    recipe.write_text(RECIPE)
    made = prepare(load_settings(recipe), base_dir=tmp_path)
    folder = tmp_path / "run"
    open_run_folder(made, folder, resume=False, rank=0)
    run_pipeline(made, folder, ranks=Ranks(), reporter=Silent())
    sft, rl = (rundir.read_json(p) for p in sorted(folder.glob("stages/*/done.json")))

    kept = made.demonstrations["train"]
    order = [int(i) for epoch in range(4) for i in permutation(0, epoch, 12)][:48]
    expected = Ledger()
    for i in order:
        prompt = len(encode_prompt(made.tokenizer, made.problems["train"][i], made.settings.chat).token_ids)
        assert prompt == kept[i].num_prompt_tokens
        expected += sequence_work(prompt, len(kept[i].token_ids) - prompt)
    assert sft["tokens"] == vars(expected)

    expected = Ledger()
    for batch in groups:
        for place, (prompt, own) in enumerate(batch):
            expected += group_work(prompt, own, scored=place >= len(batch) // 2)  # the second update's groups
    assert len(groups) == 3
    assert rl["tokens"] == vars(expected)
    tokens = sum(n for batch in groups for _, own in batch for n in own)
    assert rl["flops_paper"] == 8 * rl["shape"]["num_parameters"] * tokens


def test_a_group_is_its_parts() -> None:
    """One sample and no sharing: the same as a sequence that was also generated."""
    alone, sequence = group_work(5, [7], scored=False), sequence_work(5, 7)
    assert alone.trained_pass_tokens == sequence.trained_pass_tokens == 11
    assert alone.trained_pairs == sequence.trained_pairs == 66
    assert alone.generated_pairs == 66
    many = group_work(5, [7, 3], [4], scored=True)
    assert many.trained_pass_tokens == 5 + 6 + 2 + 3
    assert many.scored_pairs == many.trained_pairs == 15 + (21 + 30) + (3 + 10) + (6 + 15)
    assert many.demonstration_tokens == 4


def test_times() -> None:
    assert group_work(5, [7, 3], scored=True).times(3) == sum(
        [group_work(5, [7, 3], scored=True)] * 3, Ledger()
    )
