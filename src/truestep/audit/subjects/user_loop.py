"""Audits a user's own function ``step(model, optimizer, microbatches)``, which is called once per window.

``model(input_ids=…)`` returns logits [B, T, V] (``--arch plain``) or a transformers output; ``optimizer`` is
torch's SGD on its parameters; ``microbatches`` is a list of dictionaries with ``input_ids``,
``attention_mask`` and ``labels`` [B, T] (−100 for tokens that are not trained; not shifted). The function must
take exactly one step of this optimizer and clear the gradients; it may group rows into forward passes freely.
On several processes, the model is in DistributedDataParallel. With ``save(folder, model, optimizer)`` and ``load``
of the same arguments, it is also stopped after two steps and continued with a new model and optimizer.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from own_recorder import OwnRecorder

NO_OUTPUT = (
    "the audit's model returns logits [B, T, V], without .{}; pass --arch llama for a transformers model, whose "
    "output has .loss and .logits (docs/audit.md)"
)
NOT_CALLED = "the function {} ({}), so calling it does not run it; pass a plain function"


def microbatch(spec: harness.Spec, rows: list[int]) -> dict[str, torch.Tensor]:
    """Return one batch of rows, padded on the right."""
    ids, more = [spec.rows[row]["ids"] for row in rows], spec.case.get("padding", 0)
    batch = {
        "input_ids": (ids, 0),
        "attention_mask": ([[1] * len(v) for v in ids], 0),
        "labels": ([spec.labels(row) for row in rows], -100),
    }
    pad = torch.nn.functional.pad
    return {key: pad(harness.padded(v, fill), (0, more), value=fill) for key, (v, fill) in batch.items()}


class Loop:
    """The function, with one model and one optimizer for all cases, because a function may keep what it has
    made from them on its first call (an accelerator, a scaler, a schedule)."""

    def __init__(
        self, step: Callable[..., Any], spec: harness.Spec, resume: Sequence[Callable[..., Any]] = ()
    ) -> None:
        """``resume`` has two functions, ``save`` and ``load``, of (folder, model, optimizer)."""
        self.step, self.resume = step, resume
        if spec.world_size > 1:
            harness.join_ranks(spec)
        self._build(spec)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def _build(self, spec: harness.Spec) -> None:
        self.model = harness.tiny_model(spec)
        self.optimizer = spec.optimizer(self.model.parameters())
        several = spec.world_size > 1
        self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model) if several else self.model
        self.wrapped.train()

    def run(self, spec: harness.Spec) -> None:
        """Pass all windows of a case to the function, from the same start."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.start.get(name, parameter))
        self.model.zero_grad()
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["momentum"] = spec.case["momentum"]
        recorder = OwnRecorder(spec, self.model)
        self.wrapped.train()
        with recorder:
            for number, windows in enumerate(spec.parts()):
                if number:
                    self._stop_and_resume(spec, recorder)
                for window in windows:
                    self._call([microbatch(spec, rows) for rows in window])
                    recorder.end_call()
        if recorder.why_not:
            (spec.folder / "not-run.txt").write_text(recorder.why_not, "utf-8")
        else:
            recorder.finish()

    def _stop_and_resume(self, spec: harness.Spec, recorder: OwnRecorder) -> None:
        """Continue with a new model and optimizer, as a new process would."""
        save, load = self.resume
        place = spec.folder / f"saved-{spec.rank}"
        place.mkdir()
        save(place, self.wrapped, self.optimizer)
        self._build(spec)
        load(place, self.wrapped, self.optimizer)
        recorder.resume(self.model)

    def _call(self, microbatches: list[dict[str, torch.Tensor]]) -> None:
        try:
            made = self.step(self.wrapped, self.optimizer, microbatches)
        except AttributeError as error:
            if isinstance(error.obj, torch.Tensor) and error.name in ("loss", "logits"):
                raise AttributeError(NO_OUTPUT.format(error.name)) from error
            raise
        if inspect.iscoroutine(made):
            made.close()
            raise TypeError(NOT_CALLED.format("is async", "it returned a coroutine"))
        if inspect.isgenerator(made) or inspect.isasyncgen(made):
            raise TypeError(NOT_CALLED.format("contains yield", "it returned a generator"))


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


LOOPS: list[Loop] = []  # of this process: at most one


def run(spec: harness.Spec) -> None:
    if not LOOPS:
        names = spec.options["function"], *spec.options.get("resume", ())
        step, *resume = (load(spec.options["file"], name) for name in names)
        LOOPS.append(Loop(step, spec, resume))
    LOOPS[0].run(spec)
