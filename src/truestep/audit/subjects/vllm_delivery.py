"""truestep's vLLM engine, with a server on this machine, between truestep's own optimizer steps.

vLLM's Python is named by TRUESTEP_VLLM_PYTHON. Options: those of truestep_delivery without ``copy``; ``head_dim``, since
vLLM's CPU build computes no attention with heads of size 8.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import chats
import delivery_faults
import delivery_recorder
import harness
import truestep_delivery

from truestep.http_client import Client
from truestep.pipeline.vllm import tied, untied_config
from truestep.rollout.engine import Engine
from truestep.rollout.engine_vllm import Publisher, VllmEngine, client_of
from truestep.rollout.vllm_server import Servers, VllmServer, installed_version, python_with_vllm
from truestep.rollout.vllm_weights import FileDelivery, negotiate, weights_folder, write_weights
from truestep.train.policy import Policy
from truestep.train.weight_sync import Gathered, publish

SUBJECTS = [{
    "name": "truestep with vLLM weight delivery", "needs": ["truestep", "transformers", "torch"], "cases": ["delivery"],
    "configurations": [
        {"arch": "llama", "head_dim": 32, "optimizer": "adamw"},
        {"arch": "llama", "head_dim": 32, "tied": True, "optimizer": "adamw"},
        {"arch": "llama", "head_dim": 32, "lora": True, "optimizer": "adamw"},
        {"arch": "llama", "head_dim": 32, "dtype": "bfloat16", "optimizer": "adamw"},
    ],
}]  # fmt: skip
# One thread and 1 GiB of cache; vLLM's blocks are as long as a half of the prompts' common beginning.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
OPTIONS = ("--enforce-eager", "--block-size", "32")
LENGTH, RUNNING, MEBIBYTES = 256, 32, 64


class KeepsTheCache(FileDelivery):
    """Loads the weights and nothing else: a pause resets the prefix cache, too."""

    def load(self, client: Client, seconds: float, *, wakes: bool = False) -> dict[str, int]:
        ask = self.asks(client, seconds)
        call = {"method": "truestep_load", "kwargs": {"folder": self.folder}}
        found = ask("/collective_rpc", call)["results"][0]
        ask("/update_weight_version", {"new_version": str(self.version)})
        return found


def vllm_engine(
    spec: harness.Spec, policy: Policy, recorder: delivery_recorder.Delivery, stack: ExitStack
) -> truestep_delivery.Deliver:
    os.environ.update(SMALL)
    recorder.versions["vllm"] = installed_version(python_with_vllm())
    weights, fault = Gathered(policy.model, merges=True), spec.options.get("fault", "")
    copies = {table: head for table, head in tied(policy.model).items() if head not in weights}
    folder = stack.enter_context(weights_folder("", MEBIBYTES << 20))
    untied_config(policy.model).save_pretrained(folder)
    chats.tokenizer(spec.vocabulary, chats.ENDED).save_pretrained(folder)
    write_weights(folder, weights, copies)
    kind = str(spec.dtype).removeprefix("torch.")
    server = VllmServer(
        model=str(folder),
        dtype=kind,
        context_length=LENGTH,
        max_running=RUNNING,
        options=OPTIONS,
        trains=True,
    )
    servers = stack.enter_context(Servers(server))
    abilities = {url: negotiate(client_of(url), kind, LENGTH) for url in servers.urls}
    delivery = (KeepsTheCache if fault == "cache" else FileDelivery)(str(folder), abilities)
    wrong = fault and fault != "cache"
    publisher = Publisher(delivery, folder, servers=servers, copies={} if wrong else copies)
    engine = VllmEngine(servers.urls, RUNNING, publisher)
    stack.callback(engine.close)
    broken: Any = delivery_faults.Wrong(fault, recorder.plain) if wrong else None

    def deliver(version: int) -> Engine:
        if broken is None:
            publish(policy, engine, version)
        else:
            parts = broken.deliver(recorder.states).model.named_parameters()
            engine.publish({name: part.to(spec.dtype) for name, part in parts}, version)
        return engine

    return deliver


def run(spec: harness.Spec) -> None:
    truestep_delivery.run(spec, vllm_engine)
