"""Opens vLLM servers as the engine of an RL stage: started here, or attached to."""

from __future__ import annotations

import copy
import socket
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError
from truestep.pipeline.models import Session
from truestep.pipeline.prompts import longest_of_stage, longest_sample
from truestep.rollout.engine_vllm import Publisher, VllmEngine, client_of
from truestep.rollout.vllm_broadcast import Broadcast, require_transfer
from truestep.rollout.vllm_server import Servers, VllmServer
from truestep.rollout.vllm_weights import Abilities, FileDelivery, negotiate, weights_folder, write_weights
from truestep.settings import RlSettings
from truestep.train.engine_test import NEW_TOKENS, PROMPT_TOKENS
from truestep.train.policy import Policy
from truestep.train.weight_sync import Gathered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def open_vllm(session: Session, stage: RlSettings, policy: Policy, stack: ExitStack) -> VllmEngine:
    """Return an engine whose servers run until ``stack`` is closed (a collective).

    The first rank makes a model folder with the policy's weights, and starts servers from it or, with
    ``vllm.attach``, asks running ones what they can do. Raises UserError if they cannot be used."""
    own, ranks, is_first = session.prepared.settings.vllm, session.ranks, session.ranks.rank == 0
    weights = Gathered(policy, merges=True)
    forms = {name: weights.empty(name) for name in weights}
    device = next(policy.parameters()).device
    copies, told = {t: h for t, h in tied(policy.model).items() if h not in weights}, dict[str, Any]()
    hosts = set(ranks.exchange(socket.gethostname()))
    if len(hosts) > 1 and not own.attach:
        raise UserError(
            f"{stage.name}: the ranks of {len(hosts)} hosts cannot reach the servers of one; start servers with truestep "
            "vllm, and set vllm.attach"
        )
    folder, servers = Path(), None
    if is_first:
        sizes = {name: tensor.nbytes for name, tensor in forms.items()}
        total = sum(sizes.values()) + sum(sizes[name] for name in copies)
        folder = stack.enter_context(weights_folder(own.folder, total, max(sizes.values())))
        untied_config(policy.model).save_pretrained(folder)
        session.prepared.tokenizer.save_pretrained(folder)
    write_weights(folder, weights, copies, writes=is_first)
    if is_first:
        dtype, length = session.prepared.settings.compute.dtype, _context_length(session, stage)
        urls = [url.rstrip("/") for url in own.attach]
        if not urls:
            server = VllmServer(
                model=str(folder), dtype=dtype, context_length=length, max_running=stage.sampling.max_running,
                options=own.options, trains=True, sleeps=own.sleep,
            )  # fmt: skip
            session.reporter.say(f"{stage.name}: starting vLLM ({own.servers} x {length} tokens)")
            say = session.reporter.say
            servers = stack.enter_context(
                Servers(server, own.servers, own.devices, restarts=own.restarts, say=say)
            )
            urls = servers.urls
        found = {url: negotiate(client_of(url), dtype, length) for url in urls}
        for url, able in found.items():
            if own.transfer == "broadcast":
                require_transfer(url, able, device)
        told = {"folder": str(folder), "servers": {url: asdict(able) for url, able in found.items()}}
    told = ranks.exchange(told)[0]
    abilities = {url: Abilities(**found) for url, found in told["servers"].items()}
    delivery, broadcast = FileDelivery(told["folder"], abilities), None
    if own.transfer == "broadcast":
        broadcast = Broadcast(delivery, device, {n: (t.dtype, t.shape) for n, t in forms.items()}, copies)
    publisher = Publisher(
        delivery, folder, servers=servers, is_first=is_first, gather=ranks.exchange, sleeps=own.sleep, copies=copies,
        broadcast=broadcast,
    )  # fmt: skip
    engine = VllmEngine(list(abilities), stage.sampling.max_running, publisher)
    stack.callback(engine.close)
    return engine


def tied(model: PreTrainedModel) -> dict[str, str]:
    """Return the name of a tied input table, mapped to that of the output layer, or nothing.

    vLLM 0.32 on a processor packs the output layer once, when it starts: of a tied table, new weights never reach
    it. So the server gets an output layer of its own, which costs a second table of memory."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(table)]}.weight": f"{names[id(head)]}.weight"}


def untied_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the model's config, in which input and output layer are not tied."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    return config


def _context_length(session: Session, stage: RlSettings) -> int:
    """Return the tokens of the longest prompt and completion, or of the self-test: less than most models' context."""
    prepared = session.prepared
    found = longest_of_stage(prepared, stage)
    if dev := stage.dev.data:
        limit = prepared.settings.evaluate.data_sampling.max_new_tokens
        found = max(found, longest_sample(prepared, prepared.prompts[dev], dev, limit, "evaluate.sampling"))
    if found > prepared.context_length:
        raise UserError(f"stages.{stage.name}: {found} tokens do not fit into {prepared.context_length}")
    return max(found, min(prepared.context_length, PROMPT_TOKENS + NEW_TOKENS))
