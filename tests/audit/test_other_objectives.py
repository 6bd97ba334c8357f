"""Own loops in styles that people write: right ones with any objective, and wrong ones with any objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.functional import cross_entropy

from truestep.audit.environments.in_process import audit_function
from truestep.audit.measure.findings import Finding
from truestep.audit.present.words import row_of

Loop = Callable[..., Any]
CASES = ("ragged", "unsplit", "reordered", "padded", "window")
RIGHT: dict[str, tuple[Loop, str]] = {}  # name → loop, what is said of it ("" if it is RIGHT)
WRONG: dict[str, tuple[Loop, str]] = {}


def count(batches: list[dict[str, Any]]) -> int:
    return sum(int((m["labels"][:, 1:] != -100).sum()) for m in batches)


def rows(batches: list[dict[str, Any]]) -> int:
    return sum(len(m["labels"]) for m in batches)


def forward(model: Any, m: dict[str, Any], **how: Any) -> tuple[Any, Any, Any]:
    """Logits [B, T − 1, V], the mask and the loss [B, T − 1] of the tokens that they predict."""
    z, y = model(input_ids=m["input_ids"])[:, :-1], m["labels"][:, 1:]
    return z, (y != -100).float(), cross_entropy(z.transpose(1, 2), y, reduction="none", **how)


def loss(told: str, into: dict[str, tuple[Loop, str]]) -> Callable[[Loop], Loop]:
    """Register a loop that calls backward on ``function(model, micro-batch, all micro-batches)``."""

    def register(function: Loop) -> Loop:
        def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
            for m in batches:
                function(model, m, batches).backward()
            optimizer.step()
            optimizer.zero_grad()

        into[function.__name__] = (step, told)
        return function

    return register


def whole(told: str, into: dict[str, tuple[Loop, str]]) -> Callable[[Loop], Loop]:
    """Register a whole step."""

    def register(function: Loop) -> Loop:
        into[function.__name__] = (function, told)
        return function

    return register


def accumulate(model: Any, batches: list[Any], scale: float = 1.0) -> None:
    for m in batches:
        (scale * forward(model, m)[2].sum() / count(batches)).backward()


@loss("labels are smoothed by 0.1", RIGHT)
def smoothed(model, m, batches):  # type: ignore[no-untyped-def]
    return forward(model, m, label_smoothing=0.1)[2].sum() / count(batches)


@loss("a z-loss is added (weight 0.0005)", RIGHT)
def z_loss(model, m, batches):  # type: ignore[no-untyped-def]
    z, on, own = forward(model, m)
    return (own.sum() + 5e-4 * (on * z.logsumexp(-1) ** 2).sum()) / count(batches)


@loss("every token is weighted by its own probability (DFT)", RIGHT)
def dft(model, m, batches):  # type: ignore[no-untyped-def]
    own = forward(model, m)[2]
    return (own * torch.exp(-own.detach())).sum() / count(batches)


@loss("focal loss (exponent 2)", RIGHT)
def focal(model, m, batches):  # type: ignore[no-untyped-def]
    own = forward(model, m)[2]
    return (own * (1 - torch.exp(-own)) ** 2).sum() / count(batches)


@loss("mean of the rows' means", RIGHT)
def sequence_mean(model, m, batches):  # type: ignore[no-untyped-def]
    _, on, own = forward(model, m)
    return (own.sum(1) / on.sum(1)).sum() / rows(batches)


@loss("the sum over all trained tokens: the division by their number is missing", RIGHT)
def summed(model, m, batches):  # type: ignore[no-untyped-def]
    return forward(model, m)[2].sum()


@loss("the sum over all trained tokens, divided by 64 for every row", RIGHT)
def constant_length(model, m, batches):  # type: ignore[no-untyped-def]
    return forward(model, m)[2].sum() / (64 * rows(batches))


@loss("everything is multiplied by 1.004", RIGHT)
def scaled(model, m, batches):  # type: ignore[no-untyped-def]
    return 1.004 * forward(model, m)[2].sum() / count(batches)


@loss("everything is multiplied by 1e-06", RIGHT)
def tiny(model, m, batches):  # type: ignore[no-untyped-def]
    return 1e-6 * forward(model, m)[2].sum() / count(batches)


@loss("tokens have different weights", RIGHT)
def discounted(model, m, batches):  # type: ignore[no-untyped-def]
    own = forward(model, m)[2]
    return (own * 0.95 ** torch.arange(own.shape[1])).sum() / count(batches)


@loss("rows have weights that do not depend on the split", RIGHT)
def advantages(model, m, batches):  # type: ignore[no-untyped-def]
    own = forward(model, m)[2]
    advantage = (m["input_ids"][:, :1] % 5).float() - 2.2
    return -(advantage * torch.exp(own.detach() - own) * (own > 0)).sum() / count(batches)


@loss("", RIGHT)
def cast_by_hand(model, m, batches):  # type: ignore[no-untyped-def]
    z = model(input_ids=m["input_ids"])[:, :-1].bfloat16()
    return cross_entropy(z.transpose(1, 2), m["labels"][:, 1:], reduction="sum") / count(batches)


@whole("", RIGHT)
def own_groups_and_a_rate_of_each_step(model, optimizer, batches):  # type: ignore[no-untyped-def]
    kept = own_groups_and_a_rate_of_each_step.__dict__
    if "optimizer" not in kept:
        groups = [{"params": model.embed.parameters(), "lr": 0.1}, {"params": model.head.parameters()}]
        kept["optimizer"] = torch.optim.SGD(groups, lr=0.3, momentum=0.5, weight_decay=0.1)
        kept["warmup"] = torch.optim.lr_scheduler.LambdaLR(kept["optimizer"], lambda i: min(1.0, i / 5))
    accumulate(model, batches)
    kept["optimizer"].step()
    kept["warmup"].step()
    model.zero_grad()


@whole("", RIGHT)
def frozen_and_checkpointed(model, optimizer, batches):  # type: ignore[no-untyped-def]
    from torch.utils.checkpoint import checkpoint

    model.embed.requires_grad_(False)
    again = lambda input_ids: checkpoint(model, input_ids, use_reentrant=False)  # noqa: E731
    accumulate(again, batches)
    optimizer.step()
    optimizer.zero_grad()
    sum(float(forward(model, m)[2].sum().detach()) for m in batches)  # for the log


@whole("a z-loss is added (weight 0.01)", RIGHT)
def a_second_pass(model, optimizer, batches):  # type: ignore[no-untyped-def]
    accumulate(model, batches)
    for m in batches:
        z, on, _ = forward(model, m)
        (0.01 * (on * z.logsumexp(-1) ** 2).sum() / count(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()


@whole("the gradient is clipped to a norm of", RIGHT)
def clipped_before_unscaling(model, optimizer, batches):  # type: ignore[no-untyped-def]
    kept = clipped_before_unscaling.__dict__
    scaler = kept.setdefault("scaler", torch.amp.GradScaler("cpu", init_scale=1024.0))
    for m in batches:
        scaler.scale(forward(model, m)[2].sum() / count(batches)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@loss("micro_mean", WRONG)
def smoothed_by_micro_batch(model, m, batches):  # type: ignore[no-untyped-def]
    _, on, own = forward(model, m, label_smoothing=0.1)
    return own.sum() / on.sum() / len(batches)


@loss("padding", WRONG)
def all_positions(model, m, batches):  # type: ignore[no-untyped-def]
    return forward(model, m)[2].mean() / len(batches)


@loss("padding", WRONG)
def all_positions_of_the_step(model, m, batches):  # type: ignore[no-untyped-def]
    return forward(model, m)[2].sum() / sum(b["labels"].numel() for b in batches)


@loss("split", WRONG)
def z_loss_of_padding(model, m, batches):  # type: ignore[no-untyped-def]
    z, _, own = forward(model, m)
    return own.sum() / count(batches) + 0.01 * (z.logsumexp(-1) ** 2).mean() / len(batches)


@loss("split", WRONG)
def balance_of_each_micro_batch(model, m, batches):  # type: ignore[no-untyped-def]
    z, on, own = forward(model, m)
    usage = (z.softmax(-1) * on[..., None]).sum((0, 1)) / on.sum()
    return own.sum() / count(batches) + 6.4 * (usage**2).sum() / len(batches)


@loss("unknown_weights", WRONG)
def advantages_of_each_micro_batch(model, m, batches):  # type: ignore[no-untyped-def]
    reward = (m["input_ids"][:, 0] % 5).float()
    advantage = reward - reward.mean() if len(reward) > 1 else reward
    return (advantage[:, None] * forward(model, m)[2]).sum() / count(batches)


@loss("start_untrained", WRONG)
def starts_left_out(model, m, batches):  # type: ignore[no-untyped-def]
    _, on, own = forward(model, m)
    return (own * on * torch.nn.functional.pad(on[:, :-1], (1, 0))).sum() / count(batches)


@loss("stop_overweighted", WRONG)
def stops_weighted(model, m, batches):  # type: ignore[no-untyped-def]
    _, on, own = forward(model, m)
    is_last = on * (1 - torch.nn.functional.pad(on[:, 1:], (0, 1)))
    return (own * (1 + 2 * is_last)).sum() / count(batches)


@loss("prompt_trained", WRONG)
def prompts_trained_a_little(model, m, batches):  # type: ignore[no-untyped-def]
    z, on, own = forward(model, m)
    every = (
        cross_entropy(z.transpose(1, 2), m["input_ids"][:, 1:], reduction="none") * m["attention_mask"][:, 1:]
    )
    return (own.sum() + 0.05 * (every * (1 - on)).sum()) / count(batches)


@whole("decaying_weights", WRONG)
def running_average(model, optimizer, batches):  # type: ignore[no-untyped-def]
    for m in batches:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5
        accumulate(model, [m], count([m]) / count(batches))
    optimizer.step()
    optimizer.zero_grad()


@whole("not_cleared", WRONG)
def never_cleared(model, optimizer, batches):  # type: ignore[no-untyped-def]
    accumulate(model, batches)
    optimizer.step()


@whole("data_lost", WRONG)
def never_stepped(model, optimizer, batches):  # type: ignore[no-untyped-def]
    accumulate(model, batches)


@whole("data_lost", WRONG)
def cleared_before_the_step(model, optimizer, batches):  # type: ignore[no-untyped-def]
    accumulate(model, batches)
    optimizer.zero_grad()
    optimizer.step()


@whole("clip", WRONG)
def clipped_after_every_micro_batch(model, optimizer, batches):  # type: ignore[no-untyped-def]
    for m in batches:
        accumulate(model, [m], count([m]) / count(batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def judged(loop: Loop, **how: Any) -> Finding:
    torch.set_num_threads(1)
    return audit_function(loop, names=CASES, **how)


def quick(names: Iterable[str]) -> list[Any]:
    """Every second loop; the others are slow."""
    marks = [[], [pytest.mark.slow]]
    return [pytest.param(name, marks=marks[i % 2]) for i, name in enumerate(names)]


@pytest.mark.parametrize("name", quick(RIGHT))
def test_a_right_step_with_any_objective_is_named_and_not_accused(name: str) -> None:
    loop, told = RIGHT[name]
    finding = judged(loop)
    assert finding.verdict == ("DEFAULT" if told else "RIGHT"), row_of(finding)["fault"]
    assert told in row_of(finding)["fault"]
    assert bool(told) == bool(finding.codes)


@pytest.mark.parametrize("name", quick(WRONG))
def test_a_wrong_step_with_any_objective_is_a_fault(name: str) -> None:
    loop, code = WRONG[name]
    finding = judged(loop)
    assert finding.verdict == "FAULT", row_of(finding)["fault"]
    assert code in finding.codes


def test_what_is_declared_is_right() -> None:
    verdicts = {
        (name, objective): judged(RIGHT[name][0], objective=objective).verdict
        for name, objective in (("sequence_mean", "sequence_mean"), ("summed", "sum"), ("dft", "other"))
    }
    assert set(verdicts.values()) == {"RIGHT"}
    assert judged(RIGHT["summed"][0], objective="sequence_mean").verdict == "DEFAULT"
    assert judged(WRONG["balance_of_each_micro_batch"][0], objective="other").verdict == "FAULT"
    with pytest.raises(ValueError, match="unknown; use token_mean"):
        judged(RIGHT["summed"][0], objective="mean")


def test_a_mean_over_tokens_is_not_the_declared_mean_over_rows() -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        accumulate(model, batches)
        optimizer.step()
        optimizer.zero_grad()

    finding = judged(step, objective="sequence_mean")
    assert (finding.verdict, finding.codes) == ("DEFAULT", ("token_mean",))


def test_a_random_step_is_not_judged() -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        for m in batches:
            own = forward(model, m)[2]
            ((torch.rand_like(own) > 0.3) * own).sum().div(count(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    finding = audit_function(step, names=(*CASES, "repeated"))
    assert finding.verdict == "NOT OBSERVABLE"
    assert "the step is random" in row_of(finding)["reason"]


def test_one_case_that_fails_leaves_the_others_judged() -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        if any(count([m]) == 0 for m in batches):
            raise KeyError("nothing to train on")
        accumulate(model, batches)
        optimizer.step()
        optimizer.zero_grad()

    finding = audit_function(step, names=("ragged", "masked"))
    assert finding.verdict == "RIGHT"
    assert row_of(finding)["reason"] == "masked: not run (KeyError: 'nothing to train on')"


@pytest.mark.parametrize("kind", ["async", "yield"])
def test_a_function_that_does_not_run_when_it_is_called_is_named(kind: str) -> None:
    async def later(model: Any, optimizer: Any, batches: list[Any]) -> None: ...

    def one_by_one(model: Any, optimizer: Any, batches: list[Any]) -> Any:
        yield from batches

    with pytest.raises(TypeError, match=kind):
        judged(later if kind == "async" else one_by_one)


def test_a_count_before_the_shift_differs_only_where_every_token_is_trained() -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        total = sum(int((m["labels"] != -100).sum()) for m in batches)
        for m in batches:
            (forward(model, m)[2].sum() / total).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert judged(step).verdict == "RIGHT"
    finding = audit_function(step, names=(*CASES, "whole"))
    assert (finding.verdict, finding.codes) == ("DEFAULT", ("other_count",))
    assert "the first token of a row is counted" in row_of(finding)["fault"]


def test_means_weighted_by_counts_before_the_shift_are_named() -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        counts = [int((m["labels"] != -100).sum()) for m in batches]
        for m, before_shift in zip(batches, counts, strict=True):
            _, on, own = forward(model, m)
            (own.sum() / on.sum() * before_shift / sum(counts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert judged(step).verdict == "RIGHT"
    finding = audit_function(step, names=(*CASES, "whole"))
    assert (finding.verdict, finding.codes) == ("FAULT", ("count_of_firsts",))
    assert "weighted by a number of tokens that includes the first" in row_of(finding)["fault"]


@pytest.mark.parametrize("block", [7, 16])
def test_rows_that_are_cut_into_blocks_are_lost_data(block: int) -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        whole = [m["attention_mask"].bool() for m in batches]
        ids, labels = (
            torch.cat([m[key][on] for m, on in zip(batches, whole, strict=True)])
            for key in ("input_ids", "labels")
        )
        num = len(ids) // block * block
        m = {"input_ids": ids[:num].view(-1, block), "labels": labels[:num].view(-1, block)}
        (forward(model, m)[2].sum() / count([m])).backward()
        optimizer.step()
        optimizer.zero_grad()

    finding = judged(step)
    assert (finding.verdict, finding.codes) == ("FAULT", ("data_lost",))
    assert "rows are cut in two" in row_of(finding)["fault"]


def test_a_step_without_the_last_token_of_a_line_cuts_no_row() -> None:
    """The last token predicts nothing, so many loops leave it out. The audit does not find such rows."""

    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        for m in batches:
            z, y = model(input_ids=m["input_ids"][:, :-1]), m["labels"][:, 1:]
            (cross_entropy(z.transpose(1, 2), y, reduction="sum") / count(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert judged(step).verdict != "FAULT"


def test_gradients_of_single_rows_by_vmap_are_the_same_step() -> None:
    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        named = {name: p.detach() for name, p in model.named_parameters()}

        def summed(named: Any, ids: Any, labels: Any) -> Any:
            z = torch.func.functional_call(model, named, (), {"input_ids": ids[None]})[0, :-1]
            return cross_entropy(z, labels[1:], reduction="sum")

        each = torch.func.vmap(torch.func.grad(summed), in_dims=(None, 0, 0))
        parts = [each(named, m["input_ids"], m["labels"]) for m in batches]
        for name, p in model.named_parameters():
            p.grad = torch.stack([part[name].sum(0) for part in parts]).sum(0) / count(batches)
        optimizer.step()
        optimizer.zero_grad()

    assert judged(step).verdict == "RIGHT"


def test_labels_that_are_rolled_add_a_token() -> None:
    """If every token is trained, the label of the last position is the first token of the row."""

    def step(model: Any, optimizer: Any, batches: list[Any]) -> None:
        total = sum(int((m["labels"] != -100).sum()) for m in batches)
        for m in batches:
            for ids, labels, on in zip(m["input_ids"], m["labels"], m["attention_mask"].bool(), strict=True):
                z, y = model(input_ids=ids[on][None])[0], labels[on].roll(-1)
                (cross_entropy(z, y, reduction="sum") / total).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert judged(step).verdict == "RIGHT"
    finding = audit_function(step, names=(*CASES, "whole"))
    assert (finding.verdict, finding.codes) == ("FAULT", ("start_predicted",))
    assert "the last token is trained to predict it" in row_of(finding)["fault"]
