"""The engine of ``truestep eval``, made from its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from truestep.errors import UserError
from truestep.evaluate.jobs import Job, budget, remarks
from truestep.evaluate.model_adapters import EndpointAdapter, ModelAdapter, TokenAdapter
from truestep.settings import Settings

if TYPE_CHECKING:
    from truestep.rollout.engine import Engine


@contextmanager
def opened(settings: Settings) -> Iterator[tuple[ModelAdapter, str]]:
    """The adapter that turns jobs into samples, and a hash of the model ("" for an endpoint, which hides
    it)."""
    with ExitStack() as stack:
        if settings.evaluate.is_endpoint:
            from truestep.rollout.engine_endpoint import EndpointEngine, connect

            client = stack.enter_context(connect(settings.evaluate.engine))
            concurrent = settings.evaluate.sampling.max_running
            engine = EndpointEngine(client, settings.model.path, concurrent=concurrent)
            yield EndpointAdapter(engine=engine), ""
            return
        from truestep.model.load import load_tokenizer, model_content
        from truestep.pipeline.prepare import context_and_eos

        context, eos = context_and_eos(settings)
        vllm = settings.evaluate.engine == "vllm"
        adapter = TokenAdapter(
            tokenizer=load_tokenizer(settings.model), context_length=context, model_eos=eos,
            open_engine=lambda: _vllm(settings, context, stack) if vllm else _torch(settings),
            pinned_limit=settings.evaluate.sampling.max_new_tokens == "benchmark",
        )  # fmt: skip
        yield adapter, model_content(settings.model)


def _torch(settings: Settings) -> Engine:
    import torch

    from truestep.device import compute_device, make_deterministic, set_threads
    from truestep.model.load import load_model
    from truestep.rollout.engine_torch import TorchEngine
    from truestep.train.policy import Policy

    set_threads(settings.compute.threads)
    make_deterministic()
    dtype = getattr(torch, settings.compute.dtype)
    policy = Policy(load_model(settings.model, dtype=dtype, device=compute_device(), seed=settings.seed))
    running = settings.evaluate.sampling.max_running
    return TorchEngine(policy.model, max_running=running, packs=policy.packs and policy.plain_head)


def _vllm(settings: Settings, context: int, stack: ExitStack) -> Engine:
    from truestep.model.load import resolve
    from truestep.rollout.engine_vllm import VllmServer, serve

    source, running = resolve(settings.model), settings.evaluate.sampling.max_running
    if source == "tiny":
        raise UserError('engine = "vllm": the built-in model has no model folder: use engine = "torch"')
    dtype = settings.compute.dtype
    server = VllmServer(model=source, dtype=dtype, context_length=context, max_running=running)
    return stack.enter_context(serve(server))


def figures(settings: Settings) -> dict[str, Any] | None:
    """What memory and arithmetic depend on, without loading weights; None for an endpoint."""
    if settings.evaluate.is_endpoint:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    from truestep.model.load import load_model, resolve
    from truestep.pipeline.prepare import model_config

    if (source := resolve(settings.model)) == "tiny":
        cpu = torch.device("cpu")
        model: Any = load_model(settings.model, dtype=torch.float32, device=cpu, seed=settings.seed).model
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(source))
    config, width = model.config, 4 if settings.compute.dtype == "float32" else 2
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num, cache = (
        sum(p.numel() for p in model.parameters()),
        2 * heads * size * config.num_hidden_layers * width,
    )
    running = settings.evaluate.sampling.max_running
    return {"num_parameters": num, "bytes_per_parameter": width, "cache_bytes": cache, "max_running": running}


def plan_of(settings: Settings, jobs: list[Job], adapter: ModelAdapter) -> dict[str, Any]:
    """For --dry-run: every prompt made and counted, no weights loaded."""
    ready = [adapter.ready(job, settings.evaluate.few_shot) for job in jobs]
    limits, tokens = [a.max_new_tokens for a in ready], [a.num_prompt_tokens for a in ready]
    found = budget(jobs, limits, tokens, figures(settings))
    if "flops_at_most" in found["total"] and settings.evaluate.engine == "torch":
        import torch

        from truestep.device import matmul_rate

        seconds = found["total"]["flops_at_most"] / matmul_rate(getattr(torch, settings.compute.dtype))
        found["total"]["hours_if_all_run_to_the_limit"] = round(seconds / 3600, 2)
    return {**found, "notes": remarks(settings, jobs) + [note for job in ready for note in job.notes]}
