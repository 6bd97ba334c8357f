"""Faults of adapters in an SFT loop: only the adapters train, and a reference that was written separately is
the judge of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.audit.environments.in_process import subject_module
from truestep.audit.measure.cases import build
from truestep.audit.measure.findings import Finding, Verdict
from truestep.audit.measure.observations import load
from truestep.audit.measure.verdict import judge

RATE = 0.5
KINDS = {
    **{kind: {"arch": "plain", "adapter": kind} for kind in ("lora", "rslora", "dora")},
    **{arch: {"arch": arch, "adapter": "lora"} for arch in ("tied", "reused")},
}
Change = Callable[[torch.nn.Module, int], None]  # of the trained model, before the step of that number


def trained_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def audit(
    folder: Path,
    options: dict[str, Any],
    change: Change | None = None,
    left_out: Callable[[str], bool] = lambda n: False,
) -> Finding:
    """The finding about a right loop on a model whose adapters are changed, or left out of the optimizer."""
    adapters, harness = subject_module("adapters"), subject_module("harness")
    case = build("ragged", world_size=1)
    spec = harness.Spec(folder, case.to_json(), {"options": options, "learning_rate": RATE})
    model = adapters.reference(spec)
    torch.manual_seed(1)
    for parameter in trained_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    recorder = harness.Recorder(spec, adapters.reference(spec))
    recorder.resume(model)
    optimizer = spec.optimizer(
        [p for name, p in model.named_parameters() if p.requires_grad and not left_out(name)]
    )
    model.train()
    for number, window in enumerate(spec.windows()):
        if change:
            change(model, number)
        for batch in window:
            (harness.summed_loss(spec, model, batch) / spec.count(window)).backward()
        optimizer.step()
        model.zero_grad()
    recorder.finish()
    return judge("loop", options, {"ragged": load(folder, case, learning_rate=RATE)})


@pytest.mark.parametrize("kind", KINDS)
def test_right_adapters_are_right(kind: str, tmp_path: Path) -> None:
    found = audit(tmp_path, KINDS[kind])
    assert found.verdict is Verdict.RIGHT, found
    assert found.relative_error is not None
    assert found.relative_error < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_are_in_the_gradient(kind: str, tmp_path: Path) -> None:
    audit(tmp_path, KINDS[kind])
    seen = load(tmp_path, build("ragged", world_size=1), learning_rate=RATE)
    assert seen.parameters
    assert all("lora_" in name for name, _ in seen.parameters)


def test_an_adapter_that_is_not_in_the_optimizer_is_named(tmp_path: Path) -> None:
    found = audit(tmp_path, KINDS["lora"], left_out=lambda name: name == "inner.lora_B.default.weight")
    assert found.codes == ("stale_parameters",)
    assert found.found.steps[0][0].values == {"name": "inner.lora_B.default.weight"}


def test_adapters_without_a_gradient_are_counted_and_named(tmp_path: Path) -> None:
    def detach(model: Any, number: int) -> None:
        if number == 0:
            inner = model.inner
            usual = inner.forward
            inner.forward = lambda x: usual(x).detach().requires_grad_()

    found = audit(tmp_path, KINDS["lora"], detach)
    assert found.codes == ("stale_parameters",)
    named = ["inner.lora_A.default.weight", "inner.lora_B.default.weight"]
    assert found.found.steps[0][0].values == {"count": 2, "of": 4, "names": named}


def merge(model: Any, number: int) -> None:
    if number == 1:
        inner = model.inner
        added = inner.scale * inner.lora_B["default"].weight @ inner.lora_A["default"].weight
        inner.layer.weight.data += added.detach()


def scaled(model: Any, number: int) -> None:
    model.inner.scale = 7 / 3**0.5  # that of rsLoRA


@pytest.mark.parametrize("change", [merge, scaled])
def test_a_model_other_than_the_configured_one_is_found(change: Change, tmp_path: Path) -> None:
    found = audit(tmp_path, KINDS["lora"], change)
    assert found.verdict is Verdict.FAULT
    assert found.codes == ("unexplained",)


def test_a_merge_is_found_only_from_its_step_on(tmp_path: Path) -> None:
    assert not audit(tmp_path, KINDS["lora"], merge).found.in_every_step
