"""The audit's mutants as real torch loops: real backward passes, real optimizers, gloo ranks.

``PORTED`` has those that the guard claims to see, with the codes that name them and the watched step that
contains the fault for the first time. ``UNSEEN`` has the others, with the reason. Both name the audit's mutants
by their texts. Shapes: B rows of T tokens in a micro-batch, K micro-batches of a rank, D ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from truestep.audit.subjects.tiny import tiny_model
from truestep.guard import guard

VOCABULARY, STEPS, RATE = 64, 4, 0.01
LENGTHS = (2, 27, 3, 17, 40, 5, 22, 9, 33, 4, 14, 30, 6, 19, 36, 11, 25, 7, 44, 13, 12, 29, 8, 38)
PROMPT = 4


@dataclass
class Micro:
    """One micro-batch; all tensors [B, T]. ``labels`` is −100 where nothing is trained."""

    ids: Tensor
    attention: Tensor
    labels: Tensor

    @property
    def counts(self) -> Tensor:
        return (self.labels[:, 1:] != -100).sum(1)


class Lora(nn.Module):
    """A frozen linear module with a trainable product of two small ones beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.lora_B(self.lora_A(x))


def add_lora(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)
    inner = [(m, n, c) for m in list(model.modules()) for n, c in m.named_children()
             if isinstance(c, nn.Linear) and c.out_features != VOCABULARY]  # fmt: skip
    for parent, name, child in inner:
        setattr(parent, name, Lora(child))


def make_model(loop: Loop, dtype: torch.dtype) -> nn.Module:
    spec = type("Spec", (), {"options": {"arch": loop.arch}, "vocabulary": VOCABULARY})()
    model = tiny_model(spec).to(dtype)
    if loop.arch == "plain":
        model.config = type("Config", (), {"eos_token_id": 2})()
    if loop.lora:
        add_lora(model)
    if loop.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return model


def make_micro(rank: int, step: int, k: int, rows: int, stop: bool = False, seed: int = 0) -> Micro:
    """Return random rows of very different lengths; none is in two micro-batches."""
    number = (seed * 1009 + rank * 97 + step * 31 + k) * rows
    random = torch.Generator().manual_seed(number)
    lengths = [LENGTHS[(number + 5 * i) % len(LENGTHS)] for i in range(rows)]
    width = PROMPT + max(lengths)
    ids = torch.randint(3, VOCABULARY, (rows, width), generator=random)
    place = torch.arange(width)
    inside = torch.stack([place < PROMPT + n for n in lengths])
    if stop:
        for row, n in enumerate(lengths):
            ids[row, PROMPT + n - 1] = 2
    labels = torch.where(inside & (place >= PROMPT), ids, -100)
    return Micro(torch.where(inside, ids, 0), inside.long(), labels)


@dataclass
class Window:
    """What a loss may divide by."""

    micro: list[list[Micro]]  # rank, k

    def of_micro(self, rank: int, k: int) -> float:
        return float(self.micro[rank][k].counts.sum())

    def of_rank(self, rank: int) -> float:
        return sum(self.of_micro(rank, k) for k in range(len(self.micro[rank])))

    @property
    def total(self) -> float:
        return sum(self.of_rank(r) for r in range(len(self.micro)))

    def slots(self, rank: int, k: int) -> float:
        return float(self.micro[rank][k].ids.numel())


@dataclass
class Run:
    """One process of a run, as the faulty parts see it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rank: int
    num_ranks: int
    num_micro: int
    step: int = 0
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters]

    def put(self, gradients: list[Tensor | None]) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g


def nothing(run: Run, *given: Any) -> None:
    pass


def reduce_mean(run: Run) -> None:
    """Average the gradients over ranks, as DDP does."""
    if run.num_ranks > 1:
        for p in run.parameters:
            torch.distributed.all_reduce(p.grad)
            p.grad /= run.num_ranks


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets.clamp(min=0), reduction="none") * (targets != -100)


@dataclass
class Loop:
    """The parts of a loop; each is right unless it is replaced."""

    share: Callable[[Window, int, int, int], float] = lambda w, r, k, row: len(w.micro) / w.total
    targets: Callable[[Micro], Tensor] = lambda m: m.labels
    shift: int = 1
    loss: Callable[[Tensor, Tensor], Tensor] = nll
    begin: Callable[[Run], None] = nothing  # after the model and the optimizer are made
    before: Callable[[Run, int], None] = nothing  # before the k-th backward pass
    after: Callable[[Run, int], None] = nothing  # after it
    reduce: Callable[[Run], None] = reduce_mean
    clip: Callable[[Run], None] = nothing
    stepped: Callable[[Run], None] = nothing  # after the optimizer's step
    clear: bool = True
    tick: Callable[[int, int, int], float] = lambda step, k, d: step  # of the schedule
    data: Callable[[int, int], int] = lambda rank, step: rank  # whose rows a rank gets
    micro_of_step: Callable[[int, int], int] = lambda step, k: k
    rows: int = 2
    optimizer: str = "adamw"
    rate: float = RATE
    declared: dict[str, Any] = field(default_factory=dict)
    stop: bool = False
    masks: bool = True  # the model is called with labels
    arch: str = "plain"
    autocast: bool = False
    checkpointing: bool = False  # arch must not be plain
    lora: bool = False
    seed: int = 0


def make_optimizer(name: str, parameters: Any, rate: float = RATE) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)


def train(
    loop: Loop,
    dtype: torch.dtype,
    rank: int = 0,
    num_ranks: int = 1,
    num_micro: int = 4,
    guarded: bool = True,
) -> tuple[list[dict[str, Any]], nn.Module, str]:
    """Run the loop; return the guard's records, the model, and why the guard is off ("" if it is on)."""
    model = make_model(loop, dtype)
    run = Run(
        model,
        make_optimizer(loop.optimizer, [p for p in model.parameters() if p.requires_grad], loop.rate),
        rank,
        num_ranks,
        num_micro,
    )
    loop.begin(run)
    options = {"accumulation": num_micro, "on_fault": lambda record: None, **loop.declared}
    watch = guard(model, run.optimizer, **options) if guarded else None
    for step in range(STEPS):
        run.step = step
        for group in run.optimizer.param_groups:
            group["lr"] = (
                group["initial"] * share_of(loop.tick(step, num_micro, num_ranks))
                if ("initial" in group)
                else group["lr"]
            )
        count = loop.micro_of_step(step, num_micro)
        window = Window([[make_micro(loop.data(r, step), step, k, loop.rows, loop.stop, loop.seed) for k in range(count)]
                         for r in range(num_ranks)])  # fmt: skip
        for k, micro in enumerate(window.micro[rank]):
            loop.before(run, k)
            labels = {"labels": micro.labels} if loop.masks else {}
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.autocast):
                out = model(input_ids=micro.ids, attention_mask=micro.attention, **labels)
            logits = out if isinstance(out, Tensor) else out.logits
            wanted = loop.targets(micro)[:, loop.shift :]
            used = logits[:, : wanted.shape[1]].transpose(1, 2)
            by_token = loop.loss(used, wanted)
            factors = torch.tensor([loop.share(window, rank, k, row) for row in range(len(micro.ids))])
            (by_token.sum(1) * factors).sum().backward()
            loop.after(run, k)
        loop.reduce(run)
        loop.clip(run)
        run.optimizer.step()
        loop.stepped(run)
        if loop.clear:
            run.optimizer.zero_grad()
    if watch is None:
        return [], model, ""
    watch.close()
    return watch.records, model, watch.failure


def share_of(tick: float) -> float:
    return max(0.0, 1 - tick / 40)


def scheduled(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["initial"] = group["lr"]


SCHEDULE = {"begin": scheduled, "declared": {"rate": lambda step: RATE * share_of(step)}}

# Parts of the faults.


def keep(which: Callable[[Run, int], bool]) -> dict[str, Any]:
    """Discard what a backward pass added, unless ``which`` keeps it."""

    def before(run: Run, k: int) -> None:
        run.memory["was"] = run.gradients()

    def after(run: Run, k: int) -> None:
        if not which(run, k):
            run.put([torch.zeros_like(p) if g is None else g
                     for p, g in zip(run.parameters, run.memory["was"], strict=True)])  # fmt: skip

    return {"before": before, "after": after}


def last(run: Run) -> int:
    return run.num_micro - 1


def clear_before(when: Callable[[Run, int], bool]) -> dict[str, Any]:
    def before(run: Run, k: int) -> None:
        if when(run, k):
            run.put([None if g is None else torch.zeros_like(g) for g in run.gradients()])

    return {"before": before}


def each(change: Callable[[list[Tensor]], list[Tensor]]) -> dict[str, Any]:
    """Change what each backward pass adds."""

    def before(run: Run, k: int) -> None:
        run.memory["was"] = run.gradients()
        run.put([None] * len(run.parameters))

    def after(run: Run, k: int) -> None:
        own = change([g for g in run.gradients() if g is not None])
        was = run.memory["was"]
        run.put([n if w is None else w + n for w, n in zip(was, own, strict=True)])

    return {"before": before, "after": after}


def norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([g.float().norm() for g in gradients]).norm())


def limited(limit: float) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda gradients: [g * min(1.0, limit / norm(gradients)) for g in gradients]


def clip_by(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Run], None]:
    return lambda run: run.put(list(change([g for g in run.gradients() if g is not None])))


def unsynced(reduced: Callable[[int, int], bool]) -> dict[str, Any]:
    """Reduce over ranks only some of the micro-batches' gradients."""

    def before(run: Run, k: int) -> None:
        run.memory.setdefault("own", []).append(run.gradients())
        run.put([None] * len(run.parameters))

    def reduce(run: Run) -> None:
        parts = run.memory.pop("parts")
        run.memory.pop("own")
        total = [torch.zeros_like(p) for p in run.parameters]
        for k, part in enumerate(parts):
            for whole, g in zip(total, part, strict=True):
                if reduced(k, len(parts)):
                    torch.distributed.all_reduce(g)
                    g = g / run.num_ranks
                whole += g
        run.put(total)

    def after(run: Run, k: int) -> None:
        run.memory.setdefault("parts", []).append(run.gradients())

    return {"before": before, "after": after, "reduce": reduce}


def from_second_step(run: Run) -> None:
    if run.step < 1:
        reduce_mean(run)


def own_optimizer(copied: bool) -> Callable[[Run], None]:
    """Give the optimizer copies of the parameters. Without ``copied``, they never come back to the model."""

    def begin(run: Run) -> None:
        copies = [nn.Parameter(p.detach().clone()) for p in run.parameters]
        run.memory["copies"] = copies
        run.optimizer = make_optimizer("adamw", copies)

    return begin


def feed_copies(run: Run) -> None:
    for copy, p in zip(run.memory["copies"], run.parameters, strict=True):
        copy.grad = p.grad


def clear_own(run: Run) -> None:
    run.model.zero_grad()


def without_one(run: Run) -> None:
    """Give the optimizer a copy of one tensor in place of the model's."""
    some = [p if name != "inner.weight" else nn.Parameter(p.detach().clone())
            for name, p in run.model.named_parameters()]  # fmt: skip
    run.optimizer = make_optimizer("adamw", some)


def start_apart(run: Run) -> None:
    torch.manual_seed(run.rank)
    with torch.no_grad():
        for p in run.parameters:
            p += 0.01 * torch.randn_like(p)


def back_to_before(run: Run) -> None:
    """Start the next step from the parameters before this one."""
    if "start" in run.memory:
        with torch.no_grad():
            for p, old in zip(run.parameters, run.memory["start"], strict=True):
                now = p.clone()
                p.copy_(old)
                old.copy_(now)
    else:
        run.memory["start"] = [p.detach().clone() for p in run.parameters]


def round_parameters(run: Run) -> None:
    with torch.no_grad():
        for p in run.parameters:
            p.copy_(p.bfloat16().to(p.dtype) if p.dtype == torch.float32 else (p * 16).round() / 16)


def keep_values(run: Run) -> None:
    run.memory["values"] = [p.detach().clone() for p in run.parameters]


def lose_small(run: Run) -> None:
    """Undo updates below 2^-9 of their parameter."""
    with torch.no_grad():
        for p, was in zip(run.parameters, run.memory["values"], strict=True):
            p.copy_(torch.where((p - was).abs() < 2**-2 * was.abs(), was, p))


def add_noise(run: Run) -> None:
    random = torch.Generator().manual_seed(run.step)
    for p in run.parameters:
        noise = torch.randn(p.shape, generator=random).to(p.dtype)
        p.grad += 0.1 * p.grad.norm() / noise.norm() * noise


def in_bfloat16(run: Run, k: int) -> None:
    for p in run.parameters:
        p.grad = p.grad.bfloat16().to(p.dtype)


def both(*parts: Callable[..., None]) -> Callable[..., None]:
    def run_all(*given: Any) -> None:
        for part in parts:
            part(*given)

    return run_all


def running_average(run: Run, k: int) -> None:
    if k:
        run.put([None if g is None else g / 2 for g in run.gradients()])


def beside(labels: Tensor, ids: Tensor, early: bool) -> Tensor:
    """Train the token before each trained part too, or (not ``early``) not its last one."""
    on = labels != -100
    after = torch.cat([on[:, 1:], torch.zeros_like(on[:, :1])], 1)
    return torch.where(on | after if early else on & after, ids, -100)


def moved(labels: Tensor, ids: Tensor, by: int) -> Tensor:
    """Train the tokens that are ``by`` places later than those of the labels."""
    on = torch.roll(labels != -100, by, 1)
    (on[:, :1] if by > 0 else on[:, -1:]).zero_()
    return torch.where(on, ids, -100)


def no_start(labels: Tensor) -> Tensor:
    on = labels != -100
    before = torch.cat([torch.zeros_like(on[:, :1]), on[:, :-1]], 1)
    return torch.where(on & before, labels, -100)


def micro_mean(w: Window, r: int, k: int, row: int) -> float:
    return 1 / (len(w.micro[r]) * w.of_micro(r, k))


def row_mean(w: Window, r: int, k: int, row: int) -> float:
    rows = sum(len(m.ids) for rank in w.micro for m in rank)
    return len(w.micro) / (rows * float(w.micro[r][k].counts[row]))
