"""The collectives of training on several ranks, and FSDP2 with its averaging switched off.

Gradients are SUMMED over ranks, here in float32 (ddp) or by FSDP's reduce-scatter with a divide factor of one
(fsdp2), because the loss is already divided by a global total.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from truestep import signals
from truestep.device import collective_backend, compute_device, world
from truestep.errors import UserError
from truestep.model.lora import ADAPTER, LoraLinear
from truestep.model.stored import Weights, WholeWeights, fill_buffers
from truestep.signals import Interrupted
from truestep.train import wire
from truestep.train.channel import LIMIT, Channel
from truestep.train.layout import COMPUTE_DTYPE, rows_of
from truestep.train.members import Member, this_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from truestep.train.policy import Policy

Item = TypeVar("Item")
# No collective takes as long: before each that follows uneven work (sampling, saving), the ranks meet.
COLLECTIVE_MINUTES = 30
SILENCE = "TRUESTEP_RANK_SILENCE"  # environment variable: seconds of silence after which a rank is lost
_channels: list[Channel] = []  # this process's channel, while it has joined the other ranks


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's rank, the few collectives that training needs, and what ranks tell each other outside of
    them. Without a channel, as in the audit, a collective takes its place."""

    rank: int = 0
    world_size: int = 1
    channel: Channel | None = None

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=compute_device())
        dist.all_reduce(tensor, op=operation)
        return [float(v) for v in tensor]

    def sum_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Sum the gradients over ranks in place, in their own (wide) dtype."""
        if self.channel is not None:  # their micro-batches may have taken very different times
            self.channel.gather(None)
        if self.world_size > 1:
            for gradient in gradients:
                dist.all_reduce(gradient, op=dist.ReduceOp.SUM)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value in rank order, sent as JSON (torch's object collectives use pickle)."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        mine = [len(data) if rank == self.rank else 0 for rank in range(self.world_size)]
        lengths = [int(n) for n in self.sum(mine)]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded, device=compute_device()) for _ in range(self.world_size)]
        dist.all_gather(found, padded.to(compute_device()))
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(found, lengths, strict=True)]

    def mine(self, items: list[Item]) -> list[Item]:
        """Return this rank's share of a list that is the same on all ranks."""
        return items[self.rank :: self.world_size]

    def exchange(self, value: Any) -> list[Any]:
        """Return every rank's value in rank order, as ``gather`` does, but without a limit on the time that
        another rank takes to get here."""
        return self.gather(value) if self.channel is None else self.channel.gather(value)

    def barrier(self) -> None:
        """Wait until all ranks are here, however long that takes."""
        if self.world_size > 1:
            self.exchange(None)

    def stop_point(self) -> None:
        """Raise Interrupted on every rank at the same stop point, soon after any rank received a signal. All
        ranks must come here equally often."""
        if self.channel is None:
            signals.check()
        else:
            self.channel.stop_point()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Let the ranks do uneven work without collectives, in which ``signals.check`` may interrupt each of
        them anywhere. At the end they meet, and if one was interrupted, all raise Interrupted."""
        signum = 0
        try:
            yield
        except Interrupted as stop:
            if self.channel is None:
                raise
            signum = stop.signum
        if self.channel is not None and (signum := max(self.channel.gather(signum))):
            raise Interrupted(signum)


def join() -> Ranks:
    """Join the other ranks if torchrun has started any. Raises UserError if they cannot reach each other."""
    rank, world_size = world()
    if world_size > 1 and not dist.is_initialized():
        limit = timedelta(minutes=COLLECTIVE_MINUTES)
        dist.init_process_group(collective_backend(), timeout=limit)
    ranks = Ranks(rank=rank, world_size=world_size)
    if world_size > 1 and not _channels:
        _channels.append(_open_channel(ranks))
    return replace(ranks, channel=channel())


def channel() -> Channel | None:
    """Return this process's channel, or None if there are no other ranks."""
    return _channels[0] if _channels else None


def _open_channel(ranks: Ranks) -> Channel:
    """Connect every rank with rank 0, whose port and secret are told by a collective."""
    try:
        limit = float(os.environ.get(SILENCE, LIMIT))
    except ValueError:
        raise UserError(f"{SILENCE}={os.environ[SILENCE]!r} is not a number of seconds") from None
    with contextlib.ExitStack() as stack:
        offer: dict[str, Any] = {}
        if ranks.rank == 0:
            server = stack.enter_context(wire.listen(os.environ.get("MASTER_ADDR", "")))
            offer = {"port": server.getsockname()[1], "token": secrets.token_hex(16)}
        told = ranks.gather({"member": asdict(this_process(ranks.rank)), "offer": offer})
        members = [Member(**one["member"]) for one in told]
        port, token = told[0]["offer"]["port"], told[0]["offer"]["token"]
        if ranks.rank == 0:
            wires = wire.accept(server, token, ranks.world_size - 1)
        else:
            wires = {0: wire.connect(members[0].host, port, token, ranks.rank)}
    return Channel(members, ranks.rank, wires, limit)


def leave() -> None:
    """Leave together with all other ranks. Not for a rank with an error, which the others would wait for."""
    if _channels:
        _channels.pop().close()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def replicate(module: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's parameters to every rank."""
    ranks.barrier()  # a model is read from the disk
    if ranks.world_size > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), src=0)


def shard(module: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Apply FSDP2 over all ranks. Computation is in the parameters' dtype. Trained parameters are sharded in at least
    float32, in which gradients are reduced and summed, too, and never divided; the shards are then the masters. The
    module may be on the meta device. Its method ``prove`` can be called like ``forward``."""
    compute_dtype = next(module.parameters()).dtype
    wide = torch.promote_types(compute_dtype, torch.float32)
    for parameter in (p for p in module.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(wide)
    if wide != compute_dtype:
        setattr(module, COMPUTE_DTYPE, compute_dtype)
    # Inputs keep their dtype, as in a model that is not sharded.
    given: dict[str, Any] = {"reduce_dtype": wide, "cast_forward_inputs": False}
    policy = MixedPrecisionPolicy(param_dtype=None if wide == compute_dtype else compute_dtype, **given)
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # the only divider is objective.normalise
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(module, "prove")


def build(policy: Policy, layers: Iterable[nn.Module], weights: Weights, ranks: Ranks) -> None:
    """Shard a policy whose model is on the meta device, and read this rank's part of its weights (a collective)."""
    shard(policy, layers)
    fill(policy.model, weights, compute_device())
    ranks.barrier()  # a model is read from the disk
    policy.prove()
    reshard(policy)


@torch.no_grad()
def fill(model: PreTrainedModel, weights: Weights, device: torch.device) -> None:
    """Give the parameters and buffers of a model on the meta device their values. Of a sharded parameter, this rank reads
    only its rows. New adapters are the same on every rank."""
    filled: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the identity of the first, which is kept
    for name, owner in model.named_modules():
        for leaf, old in [(leaf, p) for leaf, p in owner._parameters.items() if p is not None]:
            if id(old) not in filled:
                if isinstance(owner, LoraLinear) and leaf in ADAPTER:
                    source: Weights = WholeWeights({leaf: owner.initial(leaf)})
                    path = leaf
                else:
                    source, path = weights, f"{name}.{leaf}".lstrip(".")
                rows = rows_of(old) if isinstance(old, DTensor) else (0, old.shape[0] if old.ndim else 1)
                own = source.read(path, *rows).to(device, old.dtype)
                if isinstance(old, DTensor):
                    place: dict[str, Any] = {"run_check": False, "shape": old.shape, "stride": old.stride()}
                    own = DTensor.from_local(own, old.device_mesh, old.placements, **place)
                filled[id(old)] = old, nn.Parameter(own, requires_grad=old.requires_grad)
            owner._parameters[leaf] = filled[id(old)][1]
    fill_buffers(model, weights, device)


def reshard(module: nn.Module) -> None:
    """Free the parameters that FSDP's root keeps gathered after a forward pass without a backward."""
    if isinstance(module, FSDPModule):
        module.reshard()


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank, gathered if it is sharded (a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
