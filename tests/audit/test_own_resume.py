"""A user's own loop that is stopped, and continued with a new model and optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.functional import cross_entropy

import truestep
from truestep.audit.environments.in_process import audit_function
from truestep.cli import audit_actions
from truestep.errors import UserError


def step(model: Any, optimizer: Any, microbatches: list[dict[str, torch.Tensor]]) -> None:
    total = sum((m["labels"][:, 1:] != -100).sum() for m in microbatches)
    for m in microbatches:
        logits, labels = model(input_ids=m["input_ids"])[:, :-1].flatten(0, 1), m["labels"][:, 1:].flatten()
        (cross_entropy(logits, labels, reduction="sum") / total).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, model: Any, optimizer: Any) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")


def loader(*parts: str) -> Callable[..., None]:
    """Load only these parts of what was saved."""

    def load(folder: Path, model: Any, optimizer: Any) -> None:
        saved = torch.load(folder / "state.pt", weights_only=True)
        for name, one in (("model", model), ("optimizer", optimizer)):
            if name in parts:
                one.load_state_dict(saved[name])

    return load


def own_optimizer(model: Any, optimizer: Any, microbatches: list[Any]) -> None:
    step(model, torch.optim.SGD(model.parameters(), lr=optimizer.param_groups[0]["lr"]), microbatches)


@pytest.mark.parametrize(
    ("load", "verdict", "kinds"),
    [
        (loader("model", "optimizer"), "RIGHT", set()),
        (loader("model"), "FAULT", {"resume_momentum"}),
        (loader("optimizer"), "FAULT", {"resume_parameters"}),
    ],
)
def test_what_a_checkpoint_lost_is_named(load: Callable[..., None], verdict: str, kinds: set[str]) -> None:
    found = audit_function(step, names=("ragged",), resume=(save, load))
    assert found.verdict == verdict
    seen = {
        kind for case in found.cases.values() for causes in case.steps for c in causes for kind in c.kinds
    }
    assert seen == kinds


def test_without_the_functions_nothing_is_resumed() -> None:
    assert "resumed" not in audit_function(step, names=("ragged",)).cases


def test_a_step_with_another_momentum_cannot_be_judged() -> None:
    found = audit_function(own_optimizer, names=("ragged",), resume=(save, loader("model", "optimizer")))
    assert "another momentum" in " ".join(str(r.values) for r in found.reasons)


def test_an_error_in_a_function_is_the_reason_of_its_case() -> None:
    def broken(folder: Path, model: Any, optimizer: Any) -> None:
        raise KeyError("optimizer")

    found = audit_function(step, names=("ragged",), resume=(save, broken))
    assert found.verdict == "RIGHT"
    assert "KeyError" in json.dumps([r.values for r in found.reasons])


def test_words(tmp_path: Path) -> None:
    file = tmp_path / "loop.py"
    file.write_text("def step(model, optimizer, microbatches): ...\n")
    for words in ("save", "save,", "save,load,more"):
        with pytest.raises(UserError, match=f"--resume {words}: pass SAVE,LOAD"):
            audit_actions.select(f"{file}:step", None, only="", arch="", config=None, own={"resume": words})
    (subject,), _ = audit_actions.select(
        f"{file}:step", None, only="", arch="", config=None, own={"resume": "save, load"}
    )
    assert subject.configurations[0].options["resume"] == ["save", "load"]
    assert subject.configurations[0].only[-1] == "resumed"
    with pytest.raises(UserError, match="needs two functions"):
        truestep.audit(step, resume=(save,))
