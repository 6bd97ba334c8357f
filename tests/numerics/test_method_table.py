"""Every row of the table makes the step that its paper asks for, however the batch is cut, ordered, packed or
dealt to ranks. A row that is added to the table is tested here without a line."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import table_cases
import table_worker as worker
import torch
from safetensors.torch import load_file
from step_cases import EXACT, MAX_LENGTH, close, flat, relative_error
from table_cases import models, policies, row_gradient, sequences, shuffled
from torch import Tensor
from two_processes import launch

from truestep.objective import coefficients
from truestep.objective.coefficients import Context, sequence_mean
from truestep.objective.methods import METHODS, Method, Term, build, row
from truestep.records import Origin, TokenBatch
from truestep.testing.reference.loss import gradient, score
from truestep.testing.reference.rows import ROWS, row_loss

SECONDS = 280
rows = pytest.mark.parametrize("name", list(METHODS))


@functools.cache
def whole(name: str) -> dict[str, Tensor]:
    """The row's step over one micro-batch."""
    return row_gradient(name, sequences())


def test_every_row_has_a_reference() -> None:
    assert ROWS.keys() == METHODS.keys()


@rows
def test_a_source_is_a_paper_that_the_docs_name(name: str) -> None:
    papers = re.findall(r"(?<!\w)arXiv:(\d{4}\.\d{5})", build(name, {}).source)
    docs = (Path(__file__).parents[2] / "docs/objective.md").read_text(encoding="utf-8")
    assert papers
    assert [paper for paper in papers if paper not in docs] == []


@rows
def test_a_row_is_what_its_paper_says(name: str) -> None:
    loss = row_loss(ROWS[name], score(*models(), sequences()), MAX_LENGTH)
    close(f"row, {name}", whole(name), gradient(models()[0], loss))


@rows
def test_split_permute_and_packing_do_not_matter(name: str) -> None:
    given = sequences()
    close(f"row split, {name}", row_gradient(name, given, limit=40), whole(name))
    close(f"row permuted, {name}", row_gradient(name, shuffled(given), limit=60), whole(name))
    close(f"row unshared, {name}", row_gradient(name, given, limit=70, share_prefix=False), whole(name))


@rows
def test_a_step_of_one_origin_only_is_finite(name: str) -> None:
    """Demonstrations alone, or samples alone: what is absent has no part, and no 0/0."""
    for kinds in (("own",), ("demonstration",)):
        got = flat(row_gradient(name, sequences(kinds=kinds)))
        assert bool(torch.isfinite(got).all())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """One launch of two processes for all rows."""
    folder = tmp_path_factory.mktemp("table")
    launch([str(worker.__file__), str(folder)], seconds=SECONDS)
    return [load_file(Path(folder) / f"rank-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.slow
@rows
def test_two_ranks_are_one(name: str, two: list[dict[str, Tensor]]) -> None:
    """Unequal shares, and no demonstration on one of the ranks."""
    found = [{k: rank[f"{name}/{k}"] for k in whole(name)} for rank in two]
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0]), "the ranks have parted"
    close(f"row on 2 ranks, {name}", found[0], whole(name))


def test_the_three_policies_differ_enough() -> None:
    """Ratios on both sides of every clip range, or the relations above would not see a clip."""
    scored = score(*models(), sequences())
    ratios = torch.tensor([r.item() for item in scored for r in item.ratios])
    assert float(ratios.min()) < 0.75
    assert float(ratios.max()) > 1.3
    assert 0.3 < float(((ratios > 0.8) & (ratios < 1.2)).double().sum()) / ratios.numel() < 0.9
    assert policies()[0] is not policies()[1]


# ---------------------------------------------------------------------------------------------------- mutants


def of_last_batch(patch: pytest.MonkeyPatch) -> None:
    original = table_cases.measure
    patch.setattr(table_cases, "measure", lambda asked, batches, *rest: original(asked, batches[-1:], *rest))


def over_the_microbatch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        coefficients, "sequence_mean", lambda values, batch: values.sum() / values.numel() + 0 * values
    )


def in_terms(change: Callable[[Term], Term]) -> Callable[[pytest.MonkeyPatch], None]:
    def install(patch: pytest.MonkeyPatch) -> None:
        def mutant(name: str, options: Mapping[str, Any]) -> Method:
            made = build(name, options)
            return replace(made, terms=tuple(change(t) for t in made.terms))

        patch.setattr(table_cases, "build", mutant)

    return install


def whole_demonstrations(batch: TokenBatch) -> Tensor:
    """The expert's tokens, but not those of a prefix that a sample continues."""
    expert = (batch.origin == int(Origin.EXPERT)).double()
    return sequence_mean(expert, batch) == 1


def forget_behavior(term: Term) -> Term:
    def mutant(context: Context) -> Tensor:
        assert term.coefficient is not None
        batch = replace(context.batch, behavior_logprobs=context.proximal_logprobs)
        return term.coefficient(replace(context, batch=batch))

    return term if term.coefficient is None else replace(term, coefficient=mutant)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "statistics of one micro-batch": (
        of_last_batch,
        ("reinforce_pp", "reinforce_pp_baseline", "entropy_sft"),
    ),
    "a mean over the micro-batch": (over_the_microbatch, ("gspo", "srft", "iw_sft")),
    "each part its own total": (
        in_terms(lambda t: replace(t, counted=None)),
        ("luffy", "trapo", "prefix_rft"),
    ),
    "expert tokens taken for own": (
        in_terms(lambda t: replace(t, select=row.ALL) if t.select is row.POLICY else t),
        ("luffy", "uft", "exgrpo", "hpt"),
    ),
    "only demonstrations are the expert's": (
        in_terms(lambda t: replace(t, select=whole_demonstrations) if t.select is row.EXPERT else t),
        ("prefix_rft", "uft", "trapo"),
    ),
    "the stored policy forgotten": (in_terms(forget_behavior), ("exgrpo",)),
    "schedules forgotten": (
        in_terms(lambda t: replace(t, weight=row.ALWAYS_ONE)),
        ("chord_mu", "chord_phi", "uft"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("mutant", "name"), [(m, n) for m, (_, names) in MUTANTS.items() for n in names])
def test_a_broken_row_is_seen(mutant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = whole(name)
    MUTANTS[mutant][0](monkeypatch)
    assert relative_error(row_gradient(name, sequences(), limit=40), right) > 1e-6


def test_rows_differ_from_each_other() -> None:
    """A table of one and the same objective would pass everything above. Those that share their terms differ
    in plan, gate or advantage."""
    same = {
        frozenset(pair)
        for pair in (
            ("grpo_token_mean", "dapo"), ("hpt", "relift"), ("multi_task", "relift"), ("hpt", "multi_task"),
            ("grpo", "bread"), ("reinforce_pp", "reinforce_pp_baseline"), ("super_rl", "sasr"),
        )
    }  # fmt: skip
    names = [n for n in METHODS if n != "ghpo"]
    alike = {
        frozenset((a, b))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if relative_error(whole(a), whole(b)) <= 1e3 * EXACT
    }
    assert alike == same
