"""There is one division of a loss, and it is in ``objective.normalise``."""

from __future__ import annotations

import ast

import pytest
from source_tree import PACKAGE, divisions, function, functions, methods_called, modules, short

# Tensor methods that divide by a count, or by anything.
AVERAGES = {"mean", "nanmean", "div", "div_", "divide", "true_divide", "average", "logmeanexp"}
LOSSES = {
    "cross_entropy",
    "nll_loss",
    "kl_div",
    "mse_loss",
    "CrossEntropyLoss",
    "NLLLoss",
}  # average unless told not to
ROWS = ("sft", "rl", "mixed", "guided")
NORMALISE = PACKAGE / "objective" / "normalise.py"


def test_normalise_divides_once() -> None:
    found = divisions(ast.parse(NORMALISE.read_text()))
    assert len(found) == 1
    assert found[0] in divisions(function(NORMALISE, "normalise")) or _inside(found[0])
    assert methods_called(ast.parse(NORMALISE.read_text())) & AVERAGES == set()


def _inside(division: ast.BinOp | ast.AugAssign) -> bool:
    body = function(NORMALISE, "normalise")
    return body.lineno <= division.lineno <= (body.end_lineno or 0)


def test_the_division_is_by_the_global_total() -> None:
    """Its denominator holds the ``total`` that the caller must hand in: no default, no count of its own."""
    body = function(NORMALISE, "normalise")
    (division,) = divisions(body)
    assert isinstance(division, ast.BinOp)
    assert "total" in {n.id for n in ast.walk(division.right) if isinstance(n, ast.Name)}
    assert body.args.defaults == []
    assert all(default is None for default in body.args.kw_defaults), (
        "a total with a default would be a guess"
    )


def test_the_step_gets_its_loss_from_normalise_alone() -> None:
    """The step's loss is a sum of weighted parts, each made by ``normalise``; nothing divides it on the
    way."""
    loss = function(PACKAGE / "train" / "step.py", "microbatch_loss")
    assert divisions(loss) == []
    calls = [
        n for n in ast.walk(loss) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "normalise"
    ]
    assert len(calls) == 1
    for name in ("train_step", "count_totals"):
        assert divisions(function(PACKAGE / "train" / "step.py", name)) == []


@pytest.mark.parametrize("room", ["objective", "train"])
def test_nobody_averages(room: str) -> None:
    """No mean, no ``div``, no library loss that averages; the head divides logits by the temperature."""
    found = {
        (short(path), f.name, name)
        for path in modules(room)
        for f in functions(path)
        for name in methods_called(f) & (AVERAGES | LOSSES)
    }
    temperature = {("objective/logprobs.py", name, "div_") for name in ("backward", "_scaled_logits")}
    assert found <= temperature


@pytest.mark.parametrize("room", ["objective", "train"])
def test_no_reduction_is_asked_for(room: str) -> None:
    """``reduction="mean"``, ``loss_type``, ``accumulation_steps``: other names of a second divider."""
    for path in modules(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg != "reduction", short(path)
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert "accumulation_steps" not in name, short(path)
                assert name != "AVG", short(path)


def test_coefficients_and_advantages_divide_no_tensor_of_a_loss() -> None:
    """Where a division is, it is named here, with what it divides. Coefficients and rows are left out: a
    coefficient is a function of its token and its sequence, and the relations of
    numerics/test_method_table.py fail if it is not."""
    allowed = {
        ("objective/advantage.py", "group_mean"): 1,  # rewards of a group
        ("objective/advantage.py", "group_mean_std"): 2,
        ("objective/advantage.py", "leave_one_out"): 1,
        ("objective/controller.py", "phases"): 1,  # gradient norms
        ("objective/controller.py", "decide"): 1,
        ("objective/corrections.py", "whitened"): 1,  # an advantage, by a statistic of the step
        ("objective/plan.py", "shared_prefix"): 1,  # parts of a demonstration
        ("objective/plan.py", "rounds"): 1,
        ("objective/plan.py", "anchored"): 2,
        ("objective/plan.py", "plan"): 2,
        ("objective/schedule.py", "warmed_cosine"): 1,
        ("objective/logprobs.py", "forward"): 1,  # Σ p z, over the vocabulary
        ("objective/logprobs.py", "logprobs_from_logits"): 1,
        ("objective/methods/row.py", "shaped"): 1,  # the overlong penalty's slope
        ("objective/normalise.py", "normalise"): 1,
        ("objective/schedule.py", "cosine"): 1,  # of the step
        ("objective/schedule.py", "learning_rate"): 2,
        ("objective/schedule.py", "at"): 2,
    }
    found = {
        (short(path), f.name): len(divisions(f))
        for path in modules("objective")
        for f in functions(path)
        if divisions(f) and short(path) != "objective/coefficients.py" and path.stem not in ROWS
    }
    extra = {k: v for k, v in found.items() if v > allowed.get(k, 0)}
    assert extra == {}
