"""A real vLLM server for tests, and wrong ways of handing weights to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from truestep.http_client import Client
from truestep.model.load import LoadedModel, load_model
from truestep.model.tiny import tiny_tokenizer
from truestep.pipeline.vllm import tied, untied_config
from truestep.rollout.engine_vllm import Publisher, VllmEngine, client_of
from truestep.rollout.vllm_broadcast import Broadcast
from truestep.rollout.vllm_server import ENVIRONMENT, Servers, VllmServer
from truestep.rollout.vllm_weights import Abilities, FileDelivery, negotiate, write_weights
from truestep.settings import ModelSettings
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer

ROOT = Path(__file__).resolve().parents[2]
# vLLM's build for processors: one thread, 1 GiB of cache.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
OPTIONS = ("--enforce-eager", "--block-size", "32")


def vllm_python() -> str:
    """Return the Python of an environment with vLLM's CPU build, which is made once under .bench/."""
    if named := os.environ.get(ENVIRONMENT):
        return named
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import environments

    try:
        return str(environments.interpreter("vllm", print))
    except environments.NotAvailable as error:
        pytest.skip(f"vLLM's CPU build cannot be installed here: {error}")


def tiny_policy(dtype: torch.dtype) -> Policy:
    settings = ModelSettings.model_validate(
        {
            "path": "tiny",
            "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 128},
        }
    )
    loaded: LoadedModel = load_model(settings, dtype=dtype, device=torch.device("cpu"), seed=0)
    with torch.no_grad():  # sharper than at the start, so that sampling means something
        for parameter in loaded.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return Policy(loaded)


@dataclass
class Served:
    """A policy, its server, and what is needed to make engines that hand weights over in different ways."""

    policy: Policy
    servers: Servers
    folder: Path
    abilities: dict[str, Abilities]

    def engine(
        self, delivery: type[FileDelivery] = FileDelivery, *, tells_bits: bool = True, **more: Any
    ) -> VllmEngine:
        found = {u: replace(a, tells_bits=tells_bits) for u, a in self.abilities.items()}
        copies, handed, kind = (
            tied(self.policy.model),
            delivery(str(self.folder), found),
            more.get("broadcast"),
        )
        tensors = {n: (p.dtype, p.shape) for n, p in self.policy.model.named_parameters()}
        publisher = Publisher(
            handed,
            self.folder,
            servers=self.servers,
            copies=more.get("copies", copies),
            broadcast=kind and kind(handed, torch.device("cpu"), tensors, copies),
        )
        return more.get("kind", VllmEngine)(self.servers.urls, 16, publisher)

    def scorer(self, temperature: float = 1.0) -> Scorer:
        return Scorer(policy=self.policy, temperature=temperature, tokens_per_microbatch=4096)


@contextmanager
def served(folder: Path, dtype: torch.dtype, count: int = 1) -> Iterator[Served]:
    policy = tiny_policy(dtype)
    untied_config(policy.model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_weights(folder, dict(policy.model.named_parameters()), tied(policy.model))
    name = str(dtype).removeprefix("torch.")
    server = VllmServer(
        model=str(folder), dtype=name, context_length=312, max_running=16, options=OPTIONS, trains=True
    )
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for key, value in {**SMALL, ENVIRONMENT: vllm_python()}.items():
            patch.setenv(key, value)
        servers = stack.enter_context(Servers(server, count, restarts=3, say=print))
        yield Served(policy, servers, folder, {u: negotiate(client_of(u), name, 312) for u in servers.urls})


class Tampered(FileDelivery):
    """Changes the file between the trainer and the server, from the second version on."""

    previous: dict[str, torch.Tensor] | None = None

    def load(self, client: Client, seconds: float, *, wakes: bool = False) -> dict[str, int]:
        path = Path(self.folder, "model-00000.safetensors")
        now = load_file(path)
        if self.previous is not None:
            save_file(self.tampered({n: t.clone() for n, t in now.items()}), path, metadata={"format": "pt"})
        self.previous = {n: t.clone() for n, t in now.items()}
        return super().load(client, seconds, wakes=wakes)

    def tampered(self, now: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class LeavesOut(Tampered):
    def tampered(self, now: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del now["model.layers.1.mlp.down_proj.weight"]
        return now


class SendsThePrevious(Tampered):
    def tampered(self, now: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.previous is not None
        return self.previous


class Exchanges(Tampered):
    def tampered(self, now: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        up, gate = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
        now[up], now[gate] = now[gate].clone(), now[up].clone()
        return now


class HalfStale(Tampered):
    def tampered(self, now: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.previous is not None
        return {n: torch.cat([t[: len(t) // 2], self.previous[n][len(t) // 2 :]]) for n, t in now.items()}


class Wire(Broadcast):
    """Changes the tensors between the trainer and the server, from the second version on."""

    previous: dict[str, torch.Tensor] | None = None

    def send(self, clients: Any, seconds: float, write: Any, **options: Any) -> Any:
        names = [n for name in self.tensors for n in (name, self.copies.get(name)) if n]

        def tampered(send: Any) -> None:
            read: list[torch.Tensor] = []
            write(lambda tensor: read.append(tensor.detach().clone()))
            now = dict(zip(names, read, strict=True))
            before, self.previous = self.previous, now
            changed = now if before is None else self.tampered(dict(now), before)
            for name in names:
                send(changed[name])

        return super().send(clients, seconds, tampered, **options)

    def tampered(
        self, now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class WiresThePrevious(Wire):
    def tampered(
        self, now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return before


class WiresOneOld(Wire):
    def tampered(
        self, now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        name = "model.layers.1.mlp.down_proj.weight"
        return now | {name: before[name]}


class WiresExchanged(Wire):
    def tampered(
        self, now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        up, gate = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
        return now | {up: now[gate], gate: now[up]}


class WiresHalfStale(Wire):
    def tampered(
        self, now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {n: torch.cat([t[: len(t) // 2], before[n][len(t) // 2 :]]) for n, t in now.items()}


WRONG_WIRES = (WiresThePrevious, WiresOneOld, WiresExchanged, WiresHalfStale)


class _Without:
    """A client that leaves out some calls, and answers as if they were done."""

    def __init__(self, client: Client, left_out: dict[str, Any]) -> None:
        self.client, self.left_out = client, left_out

    def ask(self, path: str, body: Any = None) -> Any:
        return self.left_out[path] if path in self.left_out else self.client.ask(path, body)


def _leaving_out(left_out: dict[str, Any]) -> type[FileDelivery]:
    class Lazy(FileDelivery):
        calls = 0

        def asks(self, client: Client, seconds: float) -> Any:
            self.calls += 1
            return super().asks(client, seconds) if self.calls == 1 else _Without(client, left_out).ask

    return Lazy


# It takes the version, but loads nothing.
SendsNothing = _leaving_out({"/collective_rpc": {"results": [{}]}})
# The prefix cache is kept after the update. (vLLM also resets it when it is paused.)
KeepsTheCache = _leaving_out(
    {"/pause?mode=abort": {}, "/reset_prefix_cache": {"success": True}, "/resume": {}}
)

WRONG_BITS = (SendsNothing, LeavesOut, SendsThePrevious, Exchanges, HalfStale)
