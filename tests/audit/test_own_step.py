"""truestep's own step under its own audit; and the sweep over model classes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from truestep.audit import subjects as registry
from truestep.audit.environments.launch import audit_one
from truestep.audit.measure.findings import Verdict
from truestep.audit.present.words import models_in_words, wrong_models
from truestep.audit.subjects import model_sweep

OWN = next(s for s in registry.TABLE if s.name == "truestep")


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(
            c,
            marks=[pytest.mark.slow] if c.world_size > 1 or "offload" in c.options else [],
            id=str(c.to_json()),
        )
        for c in OWN.configurations
    ],
)
def test_truestep_is_right(configuration: registry.Configuration) -> None:
    finding = audit_one(OWN, configuration, Path(sys.executable))
    assert finding.verdict is Verdict.RIGHT, (finding.found, finding.reasons)
    assert finding.relative_error is not None
    assert finding.relative_error < 1e-5


class Plain(torch.nn.Module):
    """A class whose loss does what it is told to."""

    def __init__(self, shift: int, counts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64)
        self.shift, self.counts = shift, counts

    def forward(
        self, input_ids, labels=None, attention_mask=None, position_ids=None, num_items_in_batch=None
    ):  # type: ignore[no-untyped-def]
        logits = self.head(self.embed(input_ids))
        loss = None
        if labels is not None:
            kept = input_ids.shape[1] - self.shift
            reduction = "sum" if self.counts and num_items_in_batch else "mean"
            loss = torch.nn.functional.cross_entropy(
                logits[0, :kept], labels[0, self.shift :], reduction=reduction
            )
            loss = loss / num_items_in_batch if reduction == "sum" else loss
        return type("Out", (), {"logits": logits, "loss": loss})


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("counts", [True, False])
def test_the_sweep_reads_shift_and_count_from_a_loss(shift: int, counts: bool) -> None:
    with torch.no_grad():
        answer = model_sweep.ask(Plain(shift, counts))
    assert answer["shift"] == shift
    assert answer["count"] == ("honoured" if counts else "ignored")
    assert answer["padding"] == "neutral"
    document = {"transformers": "0", "models": [{"model": "plain", "class": "Plain", **answer}]}
    assert bool(wrong_models(document)) == (shift != 1 or not counts)
    assert ("Plain: labels" in models_in_words(document)) == bool(wrong_models(document))


def test_attention_over_packed_rows_is_seen() -> None:
    torch.set_grad_enabled(False)
    try:
        answer = model_sweep.ask(model_sweep.build("llama", "LlamaForCausalLM"))
    finally:
        torch.set_grad_enabled(True)
    assert (answer["shift"], answer["count"]) == (1, "honoured")
    assert answer["packed, a mask of ones"] == "rows see each other"
