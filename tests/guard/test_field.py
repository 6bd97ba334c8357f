"""What real loops do: right ones that must pass, and wrong ones that look right."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_loops import make_micro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from truestep.audit.subjects.tiny import PlainModel
from truestep.guard import Guard, guard

COUNT = 4


def loss_of(model: nn.Module, step: int, k: int, **more: Any) -> Tensor:
    """Return the loss of one micro-batch: all of its tokens, over 100."""
    micro = make_micro(0, step, k, 2)
    logits = model(micro.ids, attention_mask=micro.attention, **more)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return cross_entropy(logits[:, :-1].transpose(1, 2).float(), micro.labels[:, 1:], reduction="sum") / 100


def plain(seed: int = 0) -> PlainModel:
    torch.manual_seed(seed)
    return PlainModel(64)


def run(
    body: Callable[[nn.Module, torch.optim.Optimizer, Guard, int], None], *, model: nn.Module | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, steps: int = 4, **options: Any,
) -> Guard:  # fmt: skip
    model = model or plain()
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    options = {"every": 1, "on_fault": lambda record: None, **options}
    with guard(model, made, **options) as watch:
        for step in range(steps):
            body(model, made, watch, step)
    return watch


def normal(model: nn.Module, optimizer: torch.optim.Optimizer, watch: Guard, step: int) -> None:
    for k in range(COUNT):
        loss_of(model, step, k).backward()
    optimizer.step()
    optimizer.zero_grad()
    watch.step()


def verdicts(watch: Guard) -> list[str]:
    assert watch.failure == ""
    return [r["verdict"] for r in watch.records]


def codes(watch: Guard) -> list[list[str]]:
    assert watch.failure == ""
    return [r["codes"] for r in watch.records]


# Nothing of the guard goes into the training.


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_copy_of_the_model_has_no_guard(how: str, tmp_path: Path) -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    with guard(model, optimizer, log=tmp_path / "log.jsonl") as watch:
        normal(model, optimizer, watch, 0)
        if how == "deepcopy":
            other = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        loss_of(other, 0, 0).backward()
        assert watch.sketch is not None
        assert watch.sketch.micro_batches == []
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        normal(model, optimizer, watch, 1)
    assert verdicts(watch) == ["RIGHT"] * 2


def test_an_error_of_the_guard_after_one_of_the_users_stays_inside() -> None:
    def faulty(record: dict[str, Any]) -> None:
        raise KeyError("mine")

    model = plain()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = guard(model, optimizer, every=1, on_fault=faulty)
    loss_of(model, 0, 0).backward()
    with pytest.raises(KeyError, match="mine"):
        normal_with_a_drop(model, optimizer)
    optimizer.zero_grad()
    watch.moved.after = None  # type: ignore[assignment,method-assign]
    loss_of(model, 1, 0).backward()
    optimizer.step()
    assert "NoneType" in watch.failure


def normal_with_a_drop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model, 0, 1).backward()
    optimizer.step()


def test_secrets_of_an_error_are_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rate(step: int) -> float:
        raise RuntimeError("https://me:hunter2@host/x")

    watch = run(normal, rate=rate, log=tmp_path / "log.jsonl")
    assert watch.failure
    assert "hunter2" not in (tmp_path / "log.jsonl").read_text() + capsys.readouterr().err + watch.failure


@pytest.mark.parametrize(
    "wrong",
    [{"rate": 1e-3}, {"accumulation": "4"}, {"accumulation": -1}, {"every": 2.5}, {"every": "20"},
     {"gradient": "mean"}, {"loss": "mean"}, {"max_grad_norm": "1"}],
)  # fmt: skip
def test_wrong_options_are_said_at_once(wrong: dict[str, Any]) -> None:
    model = plain()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        guard(model, torch.optim.AdamW(model.parameters()), **wrong)


# Right loops.


def test_a_closure_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step, 0)
            loss.backward()
            return loss

        optimizer.step(closure)
        watch.step()

    assert verdicts(run(body)) == []
    assert "closure" in capsys.readouterr().err


@pytest.mark.parametrize("overflows", [False, True])
def test_a_fused_optimizer_that_unscales_by_itself(overflows: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            scaler.scale(loss_of(model, step, k)).backward()
        if overflows and step == 1:
            model.inner.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        watch.step()

    found = verdicts(run(body, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)))
    assert found == ["RIGHT"] * (3 if overflows else 4)


def test_a_layer_that_is_frozen_later() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        if step == 2:
            model.layers[1].weight.requires_grad_(False)
        normal(model, optimizer, watch, step)

    class Deep(PlainModel):
        def __init__(self) -> None:
            super().__init__(64)
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, ids: Tensor, **ignored: Any) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return self.head(torch.tanh(self.inner(x)))

    torch.manual_seed(0)
    assert verdicts(run(body, model=Deep())) == ["RIGHT"] * 4


@pytest.mark.parametrize("passes", [1, 2])
def test_several_forward_passes_in_one_micro_batch(passes: int) -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(2):
            sum(loss_of(model, step, passes * k + i) for i in range(passes)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    assert verdicts(run(body, accumulation=2)) == ["RIGHT"] * 4
    # Two more of them are too many.
    assert codes(run(body, accumulation=1))[0] == ["grouping"]


def test_a_group_with_rate_zero() -> None:
    model = plain()
    groups = [
        {"params": [model.embed.weight], "lr": 0.0},
        {"params": [*model.inner.parameters(), *model.head.parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    with guard(model, optimizer, every=1, on_fault=lambda record: None) as watch:
        for step in range(3):
            normal(model, optimizer, watch, step)
    assert verdicts(watch) == ["RIGHT"] * 3


def test_labels_that_are_shifted_already() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            micro = make_micro(0, step, k, 2)
            inputs, labels = micro.ids[:, :-1], micro.labels[:, 1:]
            logits = model(inputs, labels=labels, attention_mask=micro.attention[:, :-1])
            (cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / 100).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = run(body)
    assert [c for c in codes(found) if c] == []


def test_a_gradient_from_before_the_guard() -> None:
    model = plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, 9, 9).backward()
    with guard(model, optimizer, every=1, on_fault=lambda record: None) as watch:
        for step in range(3):
            normal(model, optimizer, watch, step)
    assert verdicts(watch) == ["RIGHT"] * 2  # without the first


class Classifier(nn.Module):
    """Classes of a whole row, or one score."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.score = nn.Linear(32, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(torch.tanh(self.inner(self.embed(ids))).mean(1))


@pytest.mark.parametrize("classes", [1, 3, 100])
def test_models_of_classes_and_scores(classes: int) -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            scores = model(make_micro(0, step, k, 2).ids)
            loss = scores.square().sum() if classes == 1 else cross_entropy(scores, torch.tensor([0, 2]))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    assert verdicts(run(body, model=Classifier(classes))) == ["RIGHT"] * 4


def test_a_masked_language_model() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            micro = make_micro(0, step, k, 2)
            masked = torch.arange(micro.ids.shape[1]) % 3 == 0
            logits = model(torch.where(masked, 1, micro.ids))
            labels = torch.where(masked & (micro.attention > 0), micro.ids, -100)
            (cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / 10).backward()
        optimizer.step()
        optimizer.zero_grad()

    watch = run(body)
    assert verdicts(watch) == ["RIGHT"] * 4
    assert any("not the next tokens" in note for note in watch.records[0]["notes"])


@pytest.mark.parametrize(("gradient", "found"), [("sum", "FAULT"), ("any", "RIGHT")])
def test_a_gradient_that_is_changed_on_purpose(gradient: str, found: str) -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            loss_of(model, step, k).backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()

    assert verdicts(run(body, gradient=gradient)) == [found] * 4


def test_a_linear_module_that_is_not_plain_is_not_watched() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = plain()
    model.extra = Scaled(32, 32)
    inner = model.inner
    model.inner = nn.Sequential(inner, model.extra)
    watch = run(normal, model=model)
    assert verdicts(watch) == ["RIGHT"] * 4
    assert [w.module for w in watch.watched] == [inner]


# Wrong loops.


@pytest.mark.parametrize("declared", [True, False])
def test_a_micro_batch_without_its_backward_pass(declared: bool) -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            loss = loss_of(model, step, k)
            if k != 2:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    watch = run(body, **({"accumulation": COUNT} if declared else {}))
    if declared:
        assert codes(watch) == [["kept"]] * 4
        assert watch.records[0]["causes"][0]["values"]["lost"] == [3]
    else:
        assert all("1 times without a backward pass" in r["notes"][0] for r in watch.records)


@pytest.mark.parametrize("labels", [True, False])
def test_a_micro_batch_without_trained_tokens_may_be_skipped(labels: bool) -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            micro = make_micro(0, step, k, 2)
            nothing = torch.full_like(micro.labels, -100)
            loss = loss_of(
                model, step, k, **({"labels": nothing if k == 2 else micro.labels} if labels else {})
            )
            if k != 2:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Without labels, nobody knows that there was nothing to train.
    assert verdicts(run(body, accumulation=COUNT)) == ["RIGHT" if labels else "FAULT"] * 4


def test_steps_that_are_too_short_from_some_time_on() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT if step < 2 else COUNT - 1):
            loss_of(model, step, k).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = codes(run(body, accumulation=COUNT, steps=6))
    assert found == [[], [], [], [], ["grouping"], []]


def test_the_same_gradient_used_twice() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(COUNT):
            loss_of(model, step, k).backward()
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()

    assert codes(run(body, steps=2)) == [[], ["momentum"], [], ["momentum"]]


def test_an_optimizer_that_never_steps_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model, other = plain(), plain(1)
    mine = torch.optim.AdamW(model.parameters())
    with guard(model, torch.optim.AdamW(other.parameters())) as watch:
        for step in range(25):
            normal(model, mine, watch, step)
    assert capsys.readouterr().err.count("has not stepped") == 1
