"""More of what real loops do. Each kind is tried on both sides: the right loop passes, its faulty twin is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_loops import Micro, make_micro
from test_field import COUNT, codes, loss_of, normal, plain, run, verdicts
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from truestep.audit.subjects.tiny import PlainModel
from truestep.guard import Guard, guard

Loss = Callable[[Any, Micro], Tensor]


def every_step(loss: Loss, *, by_micro: bool = False, drops: bool = False) -> Any:
    """Return the body of a loop whose losses are sums over tokens, of which it takes the mean over all tokens of the
    step or, with ``by_micro``, of each micro-batch. With ``drops``, only the last micro-batch counts."""

    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        micros = [make_micro(0, step, k, 2) for k in range(COUNT)]
        total = sum(int(m.counts.sum()) for m in micros)
        for micro in micros:
            if drops:
                optimizer.zero_grad()
            size = int(micro.counts.sum()) * COUNT if by_micro else total
            (loss(model, micro) / size).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()

    return body


def nll(logits: Tensor, micro: Micro) -> Tensor:
    wide = logits[:, :-1].transpose(1, 2).float()
    return cross_entropy(wide, micro.labels[:, 1:], reduction="sum")


def usual(model: Any, micro: Micro) -> Tensor:
    return nll(model(micro.ids), micro)


# A step that was given up, or begun again.


def given_up(times: Callable[[int], bool], bad: float = 1.0, repeats: bool = False) -> Any:
    """Return a loop that clears the gradients of a whole group of micro-batches before some steps."""

    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        if times(step):
            for k in range(COUNT):
                (loss_of(model, step if repeats else step + 100, k) * (bad if k == 1 else 1)).backward()
            optimizer.zero_grad()
        normal(model, optimizer, watch, step)

    return body


@pytest.mark.parametrize("bad", [1.0, float("nan")])
def test_a_step_that_is_left_out_now_and_then(bad: float) -> None:
    watch = run(given_up(lambda step: step % 3 == 1, bad), accumulation=COUNT, steps=6)
    assert verdicts(watch) == ["RIGHT"] * 6
    assert "4 micro-batches before this step were thrown away" in " ".join(watch.records[1]["notes"])


def test_half_of_the_data_is_thrown_away_in_every_step() -> None:
    watch = run(given_up(lambda step: True), accumulation=COUNT, steps=4)
    assert codes(watch) == [[], [], ["kept"], []]


@pytest.mark.parametrize("accumulation", [0, COUNT])
def test_a_step_that_is_begun_again(accumulation: int) -> None:
    watch = run(given_up(lambda step: step == 1, repeats=True), accumulation=accumulation)
    assert verdicts(watch) == ["RIGHT"] * 4
    # If the number is not known, both runs of the same rows are taken as one with half the weight.
    assert ("run again" in " ".join(watch.records[1]["notes"])) == bool(accumulation)


def test_without_a_declared_number_a_step_that_is_left_out_is_a_dropped_one() -> None:
    assert "kept" in codes(run(given_up(lambda step: step == 1)))[1]


def test_a_faulty_step_after_one_that_was_left_out() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in range(2 * COUNT):
            if k in (COUNT, COUNT + 2):  # the second drops two of the step's own
                optimizer.zero_grad()
            loss_of(model, step, k).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()

    assert all("kept" in found for found in codes(run(body, accumulation=COUNT)))


def test_a_micro_batch_that_counts_twice_is_no_repeat() -> None:
    def body(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        for k in (0, 1, 2, 0):
            loss_of(model, step, k).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()

    assert all("grouping" in found for found in codes(run(body, accumulation=3)))


# Backward passes that do not go to the weights.


class Embedded(PlainModel):
    """A model that also takes embeddings."""

    def forward(self, ids: Tensor | None, embeds: Tensor | None = None, **ignored: Any) -> Tensor:
        x = self.embed(ids) if embeds is None else embeds
        return self.head(torch.tanh(self.inner(x)))


def adversarial(model: Any, micro: Micro, second: bool = False) -> Tensor:
    """Return the loss at embeddings that were moved along their own gradient, or with a penalty on it."""
    embeds = model.embed(micro.ids)
    inputs = embeds if second else embeds.detach().requires_grad_()
    loss = nll(model(None, inputs), micro)
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=second)
    if second:
        return loss + slope.square().sum()
    return nll(model(None, embeds + 0.1 * slope), micro)


def logged(model: Any, micro: Micro, is_sum: bool = False) -> Tensor:
    """Return the loss; the gradient of another one, a sum or a mean over the micro-batch, was only logged."""
    logits = model(micro.ids)
    inputs = model.embed.weight
    size = 1 if is_sum else micro.counts.sum()
    torch.autograd.grad(nll(logits, micro) / size, inputs, retain_graph=True)
    return nll(logits, micro)


@pytest.mark.parametrize("loss", [adversarial, logged])
@pytest.mark.parametrize("drops", [False, True])
def test_gradients_of_inputs_are_no_micro_batches(loss: Loss, drops: bool) -> None:
    torch.manual_seed(0)
    watch = run(every_step(loss, drops=drops), model=Embedded(64), accumulation=COUNT)
    assert codes(watch) == [["kept"] if drops else []] * 4


def test_the_loss_that_is_only_logged_does_not_hide_a_mean_of_means() -> None:
    torch.manual_seed(0)
    body = every_step(lambda model, micro: logged(model, micro, is_sum=True), by_micro=True)
    watch = run(body, model=Embedded(64), accumulation=COUNT)
    assert codes(watch) == [["micro_mean"]] * 4


def test_gradients_of_gradients_are_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    body = every_step(lambda model, micro: adversarial(model, micro, second=True))
    assert set(verdicts(run(body, model=Embedded(64)))) == {"NOT OBSERVABLE"}
    assert capsys.readouterr().err.count("create_graph") == 1


# Models.


class Whole(nn.Module):
    """A user's module around a model, which is called with a whole batch and returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, micro: Micro) -> Tensor:
        return usual(self.net, micro)


@pytest.mark.parametrize("by_micro", [False, True])
def test_a_module_that_is_called_with_a_whole_batch(by_micro: bool) -> None:
    body = every_step(lambda model, micro: model(micro), by_micro=by_micro)
    watch = run(body, model=Whole(), accumulation=COUNT)
    assert codes(watch) == [["micro_mean"] if by_micro else []] * 4
    assert watch.records[0]["tokens"] != ()


def test_a_module_that_runs_the_model_twice() -> None:
    class Pair(Whole):
        def forward(self, micro: Micro) -> Tensor:
            other = Micro(micro.ids.flip(1), micro.attention, micro.labels.flip(1))
            return usual(self.net, micro) + usual(self.net, other) / 7

    watch = run(every_step(lambda model, micro: model(micro)), model=Pair(), accumulation=COUNT)
    assert verdicts(watch) == ["RIGHT"] * 4
    assert any("no tokens were seen" in note for note in watch.records[0]["notes"])


class Scaled(nn.Linear):
    """A linear module that computes something else, as that of Falcon or one in FP8."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def without_linear(kind: str) -> nn.Module:
    model = plain()
    if kind == "subclass":
        model.inner = Scaled(32, 32)
    elif kind == "parametrized":
        model.inner = weight_norm(nn.Linear(32, 32))
    else:

        class Recurrent(PlainModel):
            def __init__(self) -> None:
                super().__init__(64)
                self.inner = nn.LSTM(32, 32, batch_first=True)

            def forward(self, ids: Tensor, **ignored: Any) -> Tensor:
                return self.head(self.inner(self.embed(ids))[0])

        torch.manual_seed(0)
        model = Recurrent()
    return model


@pytest.mark.parametrize("kind", ["subclass", "parametrized", "recurrent"])
@pytest.mark.parametrize("drops", [False, True])
def test_models_without_a_plain_linear_module(kind: str, drops: bool) -> None:
    watch = run(every_step(usual, drops=drops), model=without_linear(kind), accumulation=COUNT)
    assert codes(watch) == [["kept"] if drops else []] * 4
    assert all(not one.is_called for one in watch.watched)


def test_a_weight_that_is_computed_when_it_is_read_is_not_read() -> None:
    """The spectral norm takes a step of its power iteration each time."""

    def trained(is_watched: bool) -> list[Tensor]:
        model = plain()
        model.extra = spectral_norm(nn.Linear(32, 32))
        model.inner = nn.Sequential(model.inner, model.extra)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if is_watched:
            with guard(model, optimizer, every=1) as watch:
                normal(model, optimizer, watch, 0)
            assert verdicts(watch) == ["RIGHT"]
        else:
            for k in range(COUNT):
                loss_of(model, 0, k).backward()
            optimizer.step()
        return [*model.parameters(), *model.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_an_embedding_with_sparse_gradients() -> None:
    model = plain()
    model.embed = nn.Embedding(64, 32, sparse=True)
    assert verdicts(run(normal, model=model, optimizer=torch.optim.SGD)) == ["RIGHT"] * 4


# Targets and masks.


class Denoiser(PlainModel):
    """Sees the tokens around, so it may be asked for a token that it reads."""

    def forward(self, ids: Tensor, **ignored: Any) -> Tensor:
        x = self.embed(ids)
        return self.head(torch.tanh(self.inner(x + x.mean(1, keepdim=True))))


@pytest.mark.parametrize(("noise", "found"), [(0.15, []), (0.0, ["shift_0"])])
def test_a_denoiser_is_no_model_without_a_shift(noise: float, found: list[str]) -> None:
    def loss(model: Any, micro: Micro) -> Tensor:
        random = torch.Generator().manual_seed(int(micro.ids.sum()))
        is_noise = torch.rand(micro.ids.shape, generator=random) < noise
        ids = torch.where(is_noise, torch.randint(3, 64, micro.ids.shape, generator=random), micro.ids)
        return cross_entropy(model(ids).transpose(1, 2), micro.labels, reduction="sum")

    torch.manual_seed(0)
    assert codes(run(every_step(loss), model=Denoiser(64))) == [found] * 4


@pytest.mark.parametrize(("by_micro", "drops"), [(False, False), (True, False), (False, True)])
def test_an_encoder_and_a_decoder(by_micro: bool, drops: bool) -> None:
    """The encoder reads what the decoder is asked for, which is no missing shift."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    )

    def loss(model: Any, micro: Micro) -> Tensor:
        out = model(input_ids=micro.ids, attention_mask=micro.attention, labels=micro.labels)
        return out.loss * (micro.labels != -100).sum()

    def by_all(model: Any, optimizer: Any, watch: Guard, step: int) -> None:
        micros = [make_micro(0, step, k, 2) for k in range(COUNT)]
        counts = [int((m.labels != -100).sum()) for m in micros]
        for micro, count in zip(micros, counts, strict=True):
            if drops:
                optimizer.zero_grad()
            (loss(model, micro) / (count * COUNT if by_micro else sum(counts))).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = codes(run(by_all, model=model, accumulation=COUNT))
    assert found == [["micro_mean"] if by_micro else ["kept"] if drops else []] * 4


def entropy(share: float) -> Loss:
    def loss(model: Any, micro: Micro) -> Tensor:
        logits = model(micro.ids, attention_mask=micro.attention, labels=micro.labels)
        logp = logits.log_softmax(-1)
        return nll(logits, micro) + share * (logp.exp() * logp).sum()

    return loss


def prompts(share: float) -> Loss:
    def loss(model: Any, micro: Micro) -> Tensor:
        logits = model(micro.ids, attention_mask=micro.attention, labels=micro.labels)
        each = cross_entropy(logits[:, :-1].transpose(1, 2), micro.ids[:, 1:], reduction="none")
        return nll(logits, micro) + share * (each * (micro.labels[:, 1:] == -100)).sum()

    return loss


@pytest.mark.parametrize("share", [1e-3, 1e-2])
def test_a_small_entropy_of_all_positions_trains_no_token(share: float) -> None:
    assert codes(run(every_step(entropy(share)))) == [[]] * 4


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_prompts_that_are_trained_a_little(share: float) -> None:
    assert all("prompt_trained" in found for found in codes(run(every_step(prompts(share)))))


def test_a_step_without_a_gradient_is_said_plainly() -> None:
    watch = run(every_step(lambda model, micro: usual(model, micro) * 0), accumulation=COUNT)
    assert set(verdicts(watch)) == {"NOT OBSERVABLE"}
    assert "are zero" in watch.records[0]["notes"][0]


def test_an_optimizer_whose_step_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with guard(model, optimizer) as watch:
        step = torch.compile(optimizer.step, backend="eager")
        for number in range(21):
            loss_of(model, number, 0).backward()
            step()
            optimizer.zero_grad()
            watch.step()
    torch.compiler.reset()
    assert watch.failure == ""
    assert "compiled" in capsys.readouterr().err
