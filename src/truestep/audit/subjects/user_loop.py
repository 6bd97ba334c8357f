"""Audits a user's own function ``step(model, optimizer, microbatches)``, which is called once per window.

``model(input_ids=…)`` returns logits [B, T, V] (``--arch plain``) or a transformers output; ``optimizer`` is
torch's SGD on its parameters; ``microbatches`` is a list of dictionaries with ``input_ids``,
``attention_mask`` and ``labels`` [B, T] (−100 for tokens that are not trained; not shifted). The function must
take exactly one step of this optimizer and clear the gradients; it may group rows into forward passes freely.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch

NO_OUTPUT = (
    "the audit's model returns logits [B, T, V], without .{}; pass --arch llama for a transformers model, whose "
    "output has .loss and .logits (docs/audit.md)"
)


def microbatch(spec: harness.Spec, rows: list[int]) -> dict[str, torch.Tensor]:
    """Return one batch of rows, padded on the right."""
    ids = [spec.rows[row]["ids"] for row in rows]
    mask = harness.padded([[1] * len(v) for v in ids], 0)
    labels = harness.padded([spec.labels(row) for row in rows], -100)
    return {"input_ids": harness.padded(ids, 0), "attention_mask": mask, "labels": labels}


def run_with(step: Callable[..., Any], spec: harness.Spec) -> None:
    """Pass all windows of a case to the user's function."""
    model = harness.tiny_model(spec)
    recorder = harness.Recorder(spec, model)
    # A row's last token predicts nothing, so a loop may leave it out.
    recorder.needles = [ids[:-1] for ids in recorder.needles]
    optimizer = spec.optimizer(model.parameters())
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *call: calls.append(call))
    before = recorder.snapshot()
    model.train()
    for window in spec.windows():
        try:
            step(model, optimizer, [microbatch(spec, rows) for rows in window])
        except AttributeError as error:
            if isinstance(error.obj, torch.Tensor) and error.name in ("loss", "logits"):
                raise AttributeError(NO_OUTPUT.format(error.name)) from error
            raise
    if not calls and not torch.equal(before, recorder.snapshot()):
        # The update of a different optimizer is not a gradient times this rate, so it cannot be read.
        why = "the step does not use the optimizer that it is given"
        (spec.folder / "not-run.txt").write_text(why, "utf-8")
        return
    recorder.finish()


def load(file: str, name: str) -> Callable[..., Any]:
    """Return the function of that name in a file, which can import modules from its own folder."""
    path = Path(file)
    sys.path.insert(0, str(path.parent))
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    found.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        known = [n for n, value in vars(module).items() if callable(value)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise AttributeError(f"{path.name} has no function {name}{hint}")
    return getattr(module, name)


def run(spec: harness.Spec) -> None:
    run_with(load(spec.options["file"], spec.options["function"]), spec)
