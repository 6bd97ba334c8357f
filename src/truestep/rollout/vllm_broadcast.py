"""Sends weights to vLLM servers from memory to memory, by vLLM's own interface for weight transfer.

Each server has a separate group with the trainer's first rank (``tensor_group``), so a lost server does not break
the groups of the others. vLLM's workers receive in ``vllm_transfer``. While a server takes an update, it is paused, as with
files. What it received is compared by fingerprints.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from truestep.errors import UserError
from truestep.http_client import BadAnswer, Client
from truestep.rollout.engine import StaleWeightsError
from truestep.rollout.tensor_group import SENDER, TensorGroup
from truestep.rollout.vllm_weights import Abilities, FileDelivery

BACKEND = "truestep"  # of vLLM's --weight-transfer-config
Told = dict[str, int]
Lost = (OSError, RuntimeError, BadAnswer)  # torch raises RuntimeError if a process of a group is gone


@dataclass
class _Update:
    """One server's update in progress. ``answers`` is that of its /update_weights."""

    client: Client
    ask: Callable[..., Any]
    group: TensorGroup
    answers: Future[Any]


@dataclass
class Broadcast:
    """Sends to all servers of ``delivery``. ``tensors`` are (dtype, shape) of what is sent, in order, by name;
    ``copies`` maps a name to a second one under which it is sent, too."""

    delivery: FileDelivery
    device: torch.device
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]
    copies: Mapping[str, str] = field(default_factory=dict)
    groups: dict[str, TensorGroup] = field(default_factory=dict)  # by address

    def send(
        self, clients: Sequence[Client], seconds: float, write: Callable[[Callable[[Tensor], None]], None],
        *, wakes: bool,
    ) -> dict[str, Told | Exception]:  # fmt: skip
        """Send all weights to all servers: ``write`` gives each to the function that it gets. Return what each server
        told of them, or why it did not take them, by address. Called by the rank that sends."""
        found: dict[str, Told | Exception] = {}
        updates: list[_Update] = []

        def trying(address: str, work: Callable[[], Any]) -> None:
            if address in found:
                return  # it was lost before
            try:
                work()
            except StaleWeightsError:
                raise
            except Lost as error:
                found[address] = error
                self.groups.pop(address, None)

        def begin(client: Client) -> None:
            updates.append(self._begun(client, seconds, wakes, threads))

        def send(tensor: Tensor) -> None:
            data = tensor.detach().to(self.device).contiguous()
            for one in updates:
                trying(one.client.base, partial(one.group.broadcast, data))

        def end(one: _Update) -> None:
            found[one.client.base] = self._ended(one, wakes)

        with ThreadPoolExecutor(max(1, len(clients)), "weights") as threads:
            for client in clients:
                trying(client.base, partial(begin, client))
            write(send)
            for one in updates:
                trying(one.client.base, partial(end, one))
        return found

    def _begun(self, client: Client, seconds: float, wakes: bool, threads: ThreadPoolExecutor) -> _Update:
        ask = self.delivery.asks(client, seconds)
        if client.base not in self.groups:
            self.groups[client.base] = self._met(client, ask, seconds, threads)
        self.delivery.pause(ask, wakes=wakes)
        ask("/start_weight_update", {})
        own = [(n, *self.tensors[name]) for name in self.tensors for n in (name, self.copies.get(name)) if n]
        info = {
            "names": [name for name, _, _ in own],
            "dtypes": [str(dtype).removeprefix("torch.") for _, dtype, _ in own],
            "shapes": [list(shape) for _, _, shape in own],
        }
        answers = threads.submit(ask, "/update_weights", {"update_info": info})
        return _Update(client, ask, self.groups[client.base], answers)

    def _met(
        self, client: Client, ask: Callable[..., Any], seconds: float, threads: ThreadPoolExecutor
    ) -> TensorGroup:
        """Return the group of this process and the server's workers."""
        host = address_towards(client.base)
        size = 1 + self.delivery.abilities[client.base].workers
        group = TensorGroup(host, 0, SENDER, size, seconds)
        info = {"host": host, "port": group.port, "size": size, "seconds": seconds}
        ask("/shutdown_weight_transfer_engine", {})  # of a trainer that was here before
        answer = threads.submit(ask, "/init_weight_transfer_engine", {"init_info": info})
        group.meet(self.device)
        answer.result()
        return group

    def _ended(self, one: _Update, wakes: bool) -> Told:
        one.answers.result()
        version = str(self.delivery.version)
        one.ask("/finish_weight_update", {"weight_version": version})
        results = one.ask("/collective_rpc", {"method": "truestep_received"})["results"]
        return self.delivery.resume(one.client, one.ask, results, wakes=wakes)


def address_towards(url: str) -> str:
    """Return the address of this machine that a server at ``url`` can reach. Nothing is sent."""
    host = urlsplit(url).hostname or ""
    family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def require_transfer(url: str, able: Abilities, device: torch.device) -> None:
    """Raise UserError, which says what to do, if a server cannot take weights from the memory of a device."""
    start = 'start it with truestep vllm, or set vllm.transfer = "file"'
    if able.transfer != BACKEND:
        raise UserError(f"the vLLM server {url} takes no weights from memory; {start}")
    if able.device not in (device.type, ""):
        raise UserError(
            f"the vLLM server {url} and the trainer compute on different kinds of devices; "
            'set vllm.transfer = "file"'
        )
