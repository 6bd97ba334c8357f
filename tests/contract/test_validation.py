"""The validation loss of a stage equals a float64 reference, on any number of ranks, and changes no bit of the training.
A stage that ends early is resumed as one that was never stopped."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rank_jobs import Job
from tiny_runs import assert_continues, differing, fingerprint, go, interrupted_at, prepared, write_recipe
from transformers import LlamaForCausalLM

from truestep import rundir
from truestep.checkpoint.layout import Checkpoint, every_row
from truestep.checkpoint.reader import read_checkpoint
from truestep.cli.main import main
from truestep.model.tiny import tiny_model, tiny_tokenizer
from truestep.pipeline.sizes import batch_table
from truestep.settings import TinySettings

torch.set_num_threads(1)
HELD = [
    ("1+1", "2"),
    ("7+5=?", "7 and 5 make 12"),
    ("9", "9"),
    ("12+3", "it is 15"),
    ("0+0", "0 " * 19 + "0"),
    ("4", "44"),
]
VALIDATION = 'stages.sft.validation={ data = "held", every_steps = 3 }'
SHARED = ("stages.rl.steps=1", "evaluate.data=[]", 'data.held.source="held.jsonl"')


def recipe_in(folder: Path) -> Path:
    recipe = write_recipe(folder)
    rows = [{"id": f"h{i}", "problem": p, "answer": "0", "solution": s} for i, (p, s) in enumerate(HELD)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_in(tmp_path_factory.mktemp("recipe"))


def losses(run: Path, stage: str = "sft") -> dict[int, float]:
    (folder,) = (run / "stages").glob(f"*-{stage}")
    rows = rundir.read_jsonl(folder / "metrics.jsonl")
    return {row["step"]: row[f"{stage}/validation/loss"] for row in rows if f"{stage}/validation/loss" in row}


# --------------------------------------------------------------------------------------------------- reference


def plain_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In float64, which transformers' norm is not."""
    return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def model_of(checkpoint: Checkpoint) -> LlamaForCausalLM:
    settings = TinySettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    model = tiny_model(settings, len(tiny_tokenizer()), 512, seed=0).double()
    weights = checkpoint.tensors["parameters"]
    model.load_state_dict({n.removeprefix("model."): t for n, t in weights.items()}, strict=False)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = plain_norm.__get__(module)
    return model


@torch.no_grad()
def reference(model: LlamaForCausalLM) -> float:
    """One row after the other, without packing, and one token after the other."""
    tokenizer, total, count = tiny_tokenizer(), 0.0, 0
    for problem, solution in HELD:
        prompt = tokenizer(f"<|user|>{problem}<|end|><|assistant|>")["input_ids"]
        whole = [*prompt, *tokenizer(solution)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([whole])).logits[0].double()
        for place in range(len(prompt), len(whole)):
            row = [float(value) for value in logits[place - 1]]
            total += math.log(math.fsum(math.exp(value) for value in row)) - row[whole[place]]
            count += 1
    return total / count


def test_the_loss_is_that_of_the_reference_on_one_rank_and_on_two(recipe: Path, tmp_path: Path) -> None:
    every = (
        "compute.dtype=float64",
        "stages.sft.save_every=1",
        "stages.sft.keep_checkpoints=99",
        "stages.sft.steps=7",
    )
    overrides = (*SHARED, VALIDATION, *every)
    go(prepared(recipe, *overrides), tmp_path / "one")
    found = losses(tmp_path / "one")
    assert list(found) == [3, 6, 7], "every three steps, and after the last"
    for step, loss in found.items():
        checkpoint = read_checkpoint(tmp_path / f"one/stages/01-sft/checkpoints/step_{step:08d}", every_row)
        assert loss == pytest.approx(reference(model_of(checkpoint)), rel=1e-12)
    assert len({round(loss, 6) for loss in found.values()}) == 3
    words = ["run", str(recipe), *[word for key in overrides for word in ("--set", key)]]
    for parallel in ("ddp", "fsdp2"):
        out = ["--out", str(tmp_path / parallel), "--set", f"compute.parallel={parallel}"]
        with Job([*words, *out], tmp_path / f"job-{parallel}") as job:
            ended = job.end(120)
        assert ended.codes == [0, 0], ended.outputs
        assert losses(tmp_path / parallel) == pytest.approx(found, rel=1e-9)


def test_the_loss_does_not_depend_on_memory_and_a_long_row_is_not_an_error(
    recipe: Path, tmp_path: Path
) -> None:
    """The rows of the set have up to 60 tokens, and a micro-batch has 24 or 40 or 400."""
    found = []
    for tokens in (24, 40, 400):
        more = (f"stages.sft.tokens_per_microbatch={tokens}", "compute.dtype=float64", "stages.sft.steps=3")
        go(prepared(recipe, *SHARED, VALIDATION, *more), tmp_path / str(tokens))
        found.append(losses(tmp_path / str(tokens))[3])
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


def test_it_changes_no_bit_of_the_training(recipe: Path, tmp_path: Path) -> None:
    go(prepared(recipe, *SHARED), tmp_path / "without")
    both = (VALIDATION, VALIDATION.replace("sft", "rl"))
    go(prepared(recipe, *SHARED, *both), tmp_path / "with")
    assert losses(tmp_path / "with", "rl").keys() == {1}
    logs = {"01-sft/metrics.jsonl", "02-rl/metrics.jsonl"}
    assert set(differing(fingerprint(tmp_path / "without"), fingerprint(tmp_path / "with"))) == logs


# ---------------------------------------------------------------------------------------------- early stopping

STOPPING = (
    'stages.sft.validation={ data = "held", every_steps = 2, select_best = true }',
    "stages.sft.early_stopping={ patience = 2, min_change = 0.05 }",
    "stages.sft.steps=40",
    "stages.sft.optimizer.lr=0.05",
)


def best_of(rows: dict[int, float], min_change: float, patience: int) -> tuple[int, int]:
    """Return the last step, and the step with the lowest loss, of a stage that measured these losses."""
    best, since, last = math.inf, 0, max(rows)
    for step, loss in rows.items():
        best, since = (loss, 0) if loss < best - min_change else (best, since + 1)
        if since == patience:
            last = step
            break
    return last, min((s for s in rows if s <= last), key=rows.__getitem__)


def test_a_stage_ends_early_and_exports_its_best_weights(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and stopped at every ninth place where it looks for a signal."""
    never = [key for key in STOPPING if "patience" not in key]
    go(prepared(recipe, *SHARED, *never), tmp_path / "all")
    last, best = best_of(losses(tmp_path / "all"), 0.05, 2)
    made = prepared(recipe, *SHARED, *STOPPING)
    with monkeypatch.context() as patch:
        looks = interrupted_at(patch, 10**9).looks
        reporter = go(made, tmp_path / "whole")
    assert 2 < last < 40
    assert best < last, "the case is too easy: the last weights are the best"
    stage = tmp_path / "whole/stages/01-sft"
    done = rundir.read_json(stage / "done.json")
    assert (done["steps"], done["best"]) == (last, {"step": best, "loss": losses(tmp_path / "whole")[best]})
    assert (
        max(losses(tmp_path / "whole"))
        == last
        == max(r["step"] for r in rundir.read_jsonl(stage / "metrics.jsonl"))
    )
    (early,) = [
        said for said in reporter.said if f"ended early after step {last}/40: validation/loss" in said
    ]
    assert "pass --change stages.sft.early_stopping.patience=" in early
    assert "by more than 0.05 (min_change)" in early
    card = (stage / "export/README.md").read_text()
    assert f"step {best} of {last} (ended early; 40 were planned), the lowest validation loss" in card
    kept = read_checkpoint(stage / "best" / f"step_{best:08d}", every_row).tensors["parameters"]
    exported = LlamaForCausalLM.from_pretrained(stage / "export").state_dict()
    assert all(torch.equal(exported[name.removeprefix("model.")], tensor) for name, tensor in kept.items())
    assert any(place == "validation" for place in looks)
    places = range(3, looks.index("proximal") if "proximal" in looks else len(looks), 9)
    assert_continues(made, tmp_path / "whole", places, monkeypatch)


def test_the_plan_says_what_is_measured(recipe: Path) -> None:
    sft, rl = batch_table(prepared(recipe, *SHARED, *STOPPING), 1)
    assert sft["validation"] == "held, every 2 steps, exports the best"
    assert (
        sft["early stopping"]
        == "after 2 measurements of validation/loss in a row that are not better by more than 0.05"
    )
    assert (rl["validation"], rl["early stopping"]) == ("–", "–")
    assert "dev" not in sft
    plain = batch_table(prepared(recipe, *SHARED), 1)
    assert not {"validation", "dev", "early stopping"} & plain[0].keys()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ['stages.sft.validation={ data = "held" }'],
            "validation.data and validation.every_steps go together",
        ),
        (["stages.sft.validation={ select_best = true }"], "needs validation.data"),
        (["stages.sft.early_stopping={ patience = 2 }"], "needs validation.data and validation.every_steps"),
        ([VALIDATION, 'stages.sft.early_stopping={ patience = 2, watch = "dev/score" }'], "needs dev.data"),
        ([VALIDATION.replace('"held"', '"train"')], '= "train" is also used for training or testing'),
        ([VALIDATION.replace('"held"', '"hold"')], '= "hold" is not a data set'),
    ],
)
def test_settings_that_fit_nothing_are_refused(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
) -> None:
    words = [word for key in (*SHARED, *overrides) for word in ("--set", key)]
    monkeypatch.setattr("sys.argv", ["truestep", "run", str(recipe), "--dry-run", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_row_without_a_solution_is_named(recipe: Path, tmp_path: Path) -> None:
    from truestep.errors import UserError

    (tmp_path / "held.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(UserError, match=r"held.jsonl.*solution"):
        prepared(recipe, *SHARED[:2], f'data.held.source="{tmp_path / "held.jsonl"}"', VALIDATION)


def test_losses_get_lower(recipe: Path, tmp_path: Path) -> None:
    """On the rows that are trained on, the loss must fall."""
    (tmp_path / "held.jsonl").write_text((recipe.parent / "train.jsonl").read_text())
    held = f'data.held.source="{tmp_path / "held.jsonl"}"'
    made = prepared(recipe, *SHARED[:2], held, VALIDATION)
    pairs = {(p["train"], p["evaluation"]): p["exact"]["num_evaluation"] for p in made.overlap["pairs"]}
    assert pairs == {("train", "held"): 12}, "a copy of the training set is not noticed"
    go(made, tmp_path / "run")
    assert all(a > b for a, b in pairwise(losses(tmp_path / "run").values()))
