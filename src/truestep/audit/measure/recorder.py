"""Watches a model during training. A copy of this file runs in the audited environment and needs only torch.

The recorder writes ``CASE/rank-R.json`` and files with tensors. They contain:

* which rows went into which micro-batch, seen by a hook on the model's forward pass;
* the parameters before and after every optimizer step, seen as changes between two forward passes;
* for every row of a step, the float64 gradient of the sum of its trained tokens' negative log-likelihoods,
  computed from the logits at the step's own parameters, with the unpadded row in a separate forward pass.

Nothing in the framework is hooked or patched. Shapes: P parameters, R rows of a step, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SCHEMA = 1
Lines = list[list[list[int]]]  # the rows of every line of every forward pass
EXPLAINED = 1e-4  # relative; the part of a correct step that weights of the rows do not explain
MOST_NUMBERS = 8_000_000  # of the gradients of single tokens
FOCAL = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)  # exponents of a focal loss
Row = dict[str, list[int]]
PIECE = (
    3  # tokens of a row at each side of a cut, of which there are six at least: chance does not give these
)
FILLER = 0  # what follows a padded row


def other_masks(row: Row) -> dict[str, Row]:
    """Return the row under masks that trainers use by mistake: one token early or late (which trains the padding after the
    row), all tokens, without the first or last token of each part, with one more, or with rolled labels."""
    ids, trained = row["ids"], row["trained"]
    before, after = [*trained[1:], 0], [0, *trained[:-1]]  # 1 if the next, or previous, token is trained
    masks = {
        "early": before,
        "all": [1] * len(ids),
        "endless": [on & other for on, other in zip(trained, before, strict=True)],
        "headless": [on & other for on, other in zip(trained, after, strict=True)],
        "begun": [on | other for on, other in zip(trained, before, strict=True)],
    }
    longer = {"late": ([*ids, FILLER], [0, *trained]), "around": ([*ids, ids[0]], [*trained, trained[0]])}
    pairs = longer | {name: (ids, mask) for name, mask in masks.items()}
    return {name: {"ids": own, "trained": mask} for name, (own, mask) in pairs.items()}


def logits_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def nll_sum(model: nn.Module, ids: Sequence[int], chosen: Sequence[int], shift: int = 1) -> Tensor:
    """Return −Σ log p(ids[t] | ids[:t]) over the chosen t ≥ 1, from logits. Shifts 0 and 2 are faults."""
    tokens = torch.tensor([list(ids)])
    logits = logits_of(model(input_ids=tokens))[0]
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    where = torch.tensor([t for t in range(max(1, shift), len(ids)) if chosen[t]], dtype=torch.int64)
    return -logp[where - shift, tokens[0][where]].sum()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1).cpu() for t in tensors])


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Return every trained parameter once, sorted by name. All vectors of an observation have this order."""
    return [p for _, p in named(model)]


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)


def terms_of(logits: Tensor, logp: Tensor, own: Tensor, trained: Sequence[int]) -> dict[str, Tensor]:
    """Return the terms of other objectives, each summed over the positions [T] of a row: those that predict a
    trained token, the others, and the last one, which predicts nothing.

    ``logits`` and ``logp`` [T, V]; ``own`` [T − 1] is the log-probability of each next token.
    """
    by_position = {
        "label_smoothing": -logp.mean(-1),
        "z_loss": logits.logsumexp(-1) ** 2,
        "entropy": -(logp.exp() * logp).sum(-1),
        "logits_squared": (logits**2).mean(-1),
    }
    chosen = torch.tensor([*(bool(on) for on in trained[1:]), False])
    last = torch.arange(len(chosen)) == len(chosen) - 1
    where = {"": chosen, " other": ~chosen & ~last, " last": last}
    found = {
        name + part: (value * on).sum() for name, value in by_position.items() for part, on in where.items()
    }
    for power in FOCAL:
        found[f"focal {power:g}"] = (-own * (1 - own.exp()) ** power * chosen[:-1]).sum()
    return found


class Recorder:
    """The recorder of one rank. Create it before the framework wraps the model; call ``finish`` at the end.

    If a framework shards or casts the parameters, ``snapshot`` must return them as one flat float64 vector in
    the order of ``parameters_of``.
    """

    def __init__(self, spec: Any, model: nn.Module, snapshot: Callable[[], Tensor] | None = None) -> None:
        self.spec, self.began = spec, time.perf_counter()
        self.copy = copy.deepcopy(model).double().eval()
        self.names = [name for name, _ in named(self.copy)]  # a step may freeze more of them
        self.needles, self.ignored = [bytes(row["ids"]) for row in spec.rows], b""
        self.before: Tensor | None = None
        self.microbatches: Lines = []
        self.steps: list[tuple[Tensor, Tensor, Lines]] = []
        self.unmatched = 0
        self.ends: set[tuple[int, int]] = set()  # (row, place): a line ends there
        self.starts: set[tuple[int, int]] = set()  # (row, place): a line starts there
        self.autocast: torch.dtype | None = None  # the autocast dtype in which the model was run
        self.logged: dict[str, list[float]] = {"loss": [], "learning_rate": []}
        self.about: dict[str, Any] = {}  # what a subject adds to the observation
        # The loss that a model adds for a micro-batch of rows; a step should have its mean over micro-batches.
        self.added: Callable[[nn.Module, list[int]], Tensor] | None = None
        self.stack: list[tuple[str, int]] = []  # (file, line) of the first forward pass, the innermost first
        self._observe(model, snapshot)

    def _observe(self, model: nn.Module, snapshot: Callable[[], Tensor] | None) -> None:
        own = parameters_of(model)
        self.snapshot = snapshot if snapshot is not None else lambda: flat(own)
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def resume(self, model: nn.Module, snapshot: Callable[[], Tensor] | None = None) -> None:
        """Watch a model that was rebuilt and loaded from a checkpoint; call this before training."""
        self._close_step()
        self._hook.remove()
        self.before = None
        self._observe(model, snapshot)

    def watch(self, module: nn.Module, needles: Sequence[bytes], ignored: bytes) -> None:
        """Watch ``module`` instead, and find rows by ``needles``. Trainers need this if they run the model
        differently or omit tokens that predict nothing. ``ignored`` is the input of idle ranks."""
        self._hook.remove()
        self.needles, self.ignored = list(needles), ignored
        self._hook = module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or not (torch.is_grad_enabled() and module.training):
            return
        one = torch.ones(1, 1, dtype=self.spec.dtype)
        if (product := one @ one).dtype is not one.dtype:
            self.autocast = product.dtype
        self._close_step()
        if ids.numel() == len(self.ignored) and bytes(ids.flatten().tolist()) == self.ignored:
            return
        rows = ids.reshape(-1, ids.shape[-1]).tolist()
        lines = [self._rows_in(bytes(t % 256 for t in row)) for row in rows]
        self.unmatched += sum(not rows for rows in lines)
        for line in rows:
            self._find_pieces(bytes(t % 256 for t in line))
        self.microbatches.append(lines)
        frames = traceback.walk_stack(sys._getframe())
        self.stack = self.stack or [(frame.f_code.co_filename, line) for frame, line in frames]

    def _rows_in(self, line: bytes) -> list[int]:
        """Return the rows in this line, in order. Rows are random, so no row contains a different one."""
        hits = [(line.find(needle), number) for number, needle in enumerate(self.needles)]
        return [number for place, number in sorted(hits) if place >= 0]

    def _find_pieces(self, line: bytes) -> None:
        """Remember the places in rows, a few tokens from their ends, at which this line ends or starts."""
        for number, needle in enumerate(self.needles):
            for place in range(PIECE, len(needle) - PIECE + 1):
                if line.endswith(needle[:place][-len(line) :]):
                    self.ends.add((number, place))
                if line.startswith(needle[place:][: len(line)]):
                    self.starts.add((number, place))

    def _close_step(self) -> None:
        now = self.snapshot()
        if self.before is not None and self.microbatches and not torch.equal(now, self.before):
            self.steps.append((self.before, now, self.microbatches))
            self.microbatches = []
        self.before = now

    def finish(self, **versions: str) -> None:
        """Compute the reference gradients, and write them with what this rank has seen."""
        self._close_step()
        trained, started = time.perf_counter(), time.process_time()
        folder, rank = self.spec.folder, self.spec.rank
        steps = [self._write_step(index, *step) for index, step in enumerate(self.steps)]
        observed = {
            "schema": SCHEMA,
            "rank": rank,
            "world_size": self.spec.world_size,
            "versions": {"torch": torch.__version__, **versions},
            "steps": steps,
            "forwards_without_step": len(self.microbatches),
            "unmatched_lines": self.unmatched,
            "cut_rows": sorted({row for row, _ in self.ends & self.starts} - self._whole()),
            "autocast": str(self.autocast).removeprefix("torch.") if self.autocast else "",
            "logged": {k: [None if not math.isfinite(x) else x for x in v] for k, v in self.logged.items()},
            "location": self._location(versions),
            "parameters": [[name, list(p.shape)] for name, p in named(self.copy)],
            "dtype": str(self.spec.dtype).removeprefix("torch."),
            "about": self.about,
            "seconds": {"run": trained - self.began, "reference": time.process_time() - started},
        }
        path = folder / f"rank-{rank}.json"
        path.with_suffix(".tmp").write_text(json.dumps(observed), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)

    def _whole(self) -> set[int]:
        """Return the rows that were found whole."""
        batches = [batch for _, _, seen in self.steps for batch in seen] + self.microbatches
        return {row for batch in batches for line in batch for row in line}

    def _location(self, versions: Iterable[str]) -> str:
        """Return FILE:LINE where the audited package, or the user's own loop, runs the model."""
        own = str(self.spec.options.get("file", ""))
        parts = [f"/site-packages/{package}/" for package in versions]
        found = [f"{file}:{line}" for part in parts for file, line in self.stack if part in file]
        return next(iter(found + [f"{file}:{line}" for file, line in self.stack if file == own]), "")

    def _write_step(self, index: int, before: Tensor, after: Tensor, lines: Lines) -> dict[str, Any]:
        micro = [[row for line in batch for row in line] for batch in lines]
        own = self._own(self.copy)
        for parameter, part in zip(own, before.split([p.numel() for p in own]), strict=True):
            parameter.data.copy_(part.view_as(parameter))
        rows = sorted({row for batch in micro for row in batch})
        pairs = [self._gradient(self.copy, [row]) for row in rows]
        losses, gradients = [loss for loss, _ in pairs], [gradient for _, gradient in pairs]
        control = self._control(micro, dict(zip(rows, gradients, strict=True)))
        change, used, added = before - after, self.used(index), self._mean_added(micro)
        explained = self._explained(
            change - self.spec.lr * added if used is None else used[0] - added, gradients, rows
        )
        masks = {} if explained else self._masks(rows)
        extras = {} if explained else self._extras(micro)
        name = f"rank-{self.spec.rank}-step-{index}"
        parts = self._parts(name, rows) if not explained and self.wants_parts(index) else None
        return {
            "microbatches": lines,
            "rows": rows,
            "row_losses": losses,
            "before": self._write(f"{name}.before", before),
            "after": self._write(f"{name}.after", after),
            "gradients": self._write(f"{name}.gradients", torch.stack(gradients)) if gradients else None,
            "control": self._write(f"{name}.control", control),
            "added": self._write(f"{name}.added", added) if self.added else None,
            "extras": {key: self._write(f"{name}.{key}", value) for key, value in extras.items()},
            "used": used and {"gradient": self._write(f"{name}.used", used[0]), "exact": used[1]},
            "parts": parts,
            "masks": {
                key: {"counts": counts, "gradients": self._write(f"{name}.mask-{key}", value)}
                for key, (counts, value) in masks.items()
            },
        }

    def used(self, index: int) -> tuple[Tensor, bool] | None:
        """Return the gradient [P] that the optimizer was seen to use in a step, and whether it was read from
        the optimizer itself. None if only the parameters were seen."""
        return None

    def wants_parts(self, index: int) -> bool:
        """Return whether to say more about an unexplained step: the first one of a case tells about all."""
        return index == 0

    def _parts(self, name: str, rows: Sequence[int]) -> dict[str, Any]:
        """Write the gradient of every token's −log p, and of the terms that other objectives add, by row."""
        own, num = self._own(self.copy), sum(len(self.spec.rows[row]["ids"]) for row in rows)
        tokens, terms, gradients, summed = [], [], list[Tensor](), list[Tensor]()
        with_tokens = num * sum(p.numel() for p in own) <= MOST_NUMBERS
        for row in rows:
            ids, trained = self.spec.rows[row]["ids"], self.spec.rows[row]["trained"]
            logits = logits_of(self.copy(input_ids=torch.tensor([ids])))[0].double()
            logp = torch.log_softmax(logits, -1)
            own_logp = logp[range(len(ids) - 1), ids[1:]]
            for place in range(1, len(ids)) if with_tokens else ():
                tokens.append([row, place, bool(trained[place]), float(own_logp[place - 1].detach())])
                gradients.append(self._of(-own_logp[place - 1], own))
            for term, value in terms_of(logits, logp, own_logp, trained).items():
                terms.append([term, row])
                summed.append(self._of(value, own))
        nothing = torch.zeros(0, sum(p.numel() for p in own))
        stacked = {"token": gradients, "term": summed}
        files = {
            f"{key}_gradients": self._write(f"{name}.{key}s", torch.stack(value) if value else nothing)
            for key, value in stacked.items()
        }
        return {"tokens": tokens, "terms": terms, **files}

    @staticmethod
    def _of(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        wanted = [p for p in parameters if p.requires_grad]
        found = iter(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True))
        parts = [next(found) if p.requires_grad else None for p in parameters]
        return flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)])

    def _mean_added(self, micro: Sequence[list[int]]) -> Tensor:
        """Return the gradient of the mean of what the model adds to this rank's micro-batches."""
        self.copy.zero_grad()
        if self.added:
            for rows in micro:
                (self.added(self.copy, rows) / len(micro)).backward()
        return self._gradients(self.copy)

    def _control(self, micro: Sequence[Sequence[int]], exact: dict[int, Tensor]) -> Tensor:
        """Return the gradient sum in the subject's own precision or autocast, which shows its distance from
        float64. For a clip or a schedule in float32, return the exact sum; other cases show this distance."""
        total = torch.zeros_like(flat(self._own(self.copy)))
        if self.spec.is_relation and self.spec.dtype is not torch.bfloat16 and self.autocast is None:
            return sum((exact[row] for batch in micro for row in batch), total)
        wide = torch.promote_types(self.spec.dtype, torch.float32)
        rough = copy.deepcopy(self.copy).to(self.spec.dtype)
        with torch.autocast("cpu", dtype=self.autocast) if self.autocast else contextlib.nullcontext():
            for batch in micro:
                total += self._gradient(rough, batch)[1].to(wide).double()
        return total

    def _explained(self, change: Tensor, gradients: Sequence[Tensor], rows: Sequence[int]) -> bool:
        """Return whether weights of the rows explain this step, so that extras are not needed. Extras are
        never needed for NaN, AdamW (not a sum of gradients) and relations (whose faults have other names).
        Other ranks may have had any of the other rows."""
        if self.spec.is_relation or self.spec.options.get("optimizer", "sgd") != "sgd":
            return True
        if not bool(torch.isfinite(change).all()):
            return True
        if not gradients:
            return False
        if self.spec.world_size > 1:
            others = [row for row in range(len(self.spec.rows)) if row not in rows]
            gradients = [*gradients, *(self._gradient(self.copy, [row])[1] for row in others)]
        columns = torch.stack(list(gradients), dim=1)
        rest = change - columns @ torch.linalg.lstsq(columns, change[:, None], driver="gelsd").solution[:, 0]
        return bool(rest.norm() <= EXPLAINED * change.norm())

    def _extras(self, micro: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return what a wrong mask or a wrong shift would have added to the step's gradient sum."""
        wrong: dict[str, dict[str, Any]] = {"prompt": {"masked": True}, "shift_0": {"shift": 0}}
        wrong |= {"shift_2": {"shift": 2}, "stop": {"ends": True}}
        nothing, how = torch.zeros_like(flat(self._own(self.copy))), wrong.items()
        return {k: sum((self._gradient(self.copy, rows, **h)[1] for rows in micro), nothing) for k, h in how}

    def _masks(self, rows: Sequence[int]) -> dict[str, tuple[list[int], Tensor]]:
        """Return, for every other mask, the numbers of trained tokens and the gradients [R, P] of the rows."""
        found: dict[str, tuple[list[int], list[Tensor]]] = {}
        for number in rows:
            for key, row in other_masks(self.spec.rows[number]).items():
                counts, gradients = found.setdefault(key, ([], []))
                counts.append(sum(row["trained"][1:]))
                gradients.append(self._sum(self.copy, [(row["ids"], row["trained"])])[1])
        return {key: (counts, torch.stack(gradients)) for key, (counts, gradients) in found.items()}

    def _gradient(
        self, model: nn.Module, rows: Sequence[int], masked: bool = False, shift: int = 1, ends: bool = False
    ) -> tuple[float, Tensor]:
        """Return (Σ of losses, float64 gradient [P]) of the rows, run one by one. ``masked`` selects the
        tokens that are not trained; ``ends`` selects only the last token of each trained part."""
        pairs = []
        for row in rows:
            trained = self.spec.rows[row]["trained"]
            chosen = [int(bool(t) != masked) for t in trained]
            if ends:
                chosen = [int(on and not after) for on, after in zip(trained, [*trained[1:], 0], strict=True)]
            pairs.append((self.spec.rows[row]["ids"], chosen))
        return self._sum(model, pairs, shift)

    def _sum(
        self, model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], shift: int = 1
    ) -> tuple[float, Tensor]:
        """Return the same for pairs of tokens and a mask."""
        model.zero_grad()
        total = 0.0
        for ids, chosen in pairs:
            loss = nll_sum(model, ids, chosen, shift)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
        return total, self._gradients(model)

    def _own(self, model: nn.Module) -> list[Tensor]:
        """Return the parameters of the copy, or of a copy of it, in the order of all vectors."""
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.names]

    def _gradients(self, model: nn.Module) -> Tensor:
        return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self._own(model)])

    def _write(self, name: str, value: Tensor) -> dict[str, Any]:
        """Write a raw little-endian buffer, and return its header, which the JSON file contains."""
        data = value.detach().double().contiguous()
        (self.spec.folder / f"{name}.bin").write_bytes(ctypes.string_at(data.data_ptr(), 8 * data.numel()))
        return {"file": f"{name}.bin", "dtype": "<f8", "shape": list(data.shape)}
