"""Checks of sampling: the engine's speed and its distance from the trainer, and vLLM's proof of fresh weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from truestep.doctor.checks import Bench, Number, Skip
from truestep.doctor.models import accumulate, batches_of, documents, layers_that_fit, random_policy, requests
from truestep.http_client import Client
from truestep.model.tiny import tiny_tokenizer
from truestep.pipeline.vllm import tied, untied_config
from truestep.rollout.engine import SamplingParameters, StaleWeightsError
from truestep.rollout.engine_torch import TorchEngine
from truestep.rollout.engine_vllm import Publisher, VllmEngine, client_of
from truestep.rollout.vllm_server import ENVIRONMENT, Servers, VllmServer, installed_version
from truestep.rollout.vllm_weights import FileDelivery, negotiate, write_weights
from truestep.settings import OptimizerSettings
from truestep.train.engine_test import FIRST, SelfTest, sampled_gap
from truestep.train.optim import MasterOptimizer
from truestep.train.policy import Policy
from truestep.train.scoring import Scorer
from truestep.train.weight_sync import publish

RATE = 1e-6  # the smallest learning rate of the recipes
VLLM_TOKENS = 312  # of the self-test's prompts and samples


def sampling(bench: Bench) -> Iterator[Number]:
    """The engine's log-probabilities must be the trainer's, and old weights must be found after a step of 1e-6."""
    layers = layers_that_fit(bench, 2 * bench.dtype.itemsize + 12, reserve=1 if bench.is_small else 16)
    if not layers:
        raise Skip("the device's free memory does not hold one layer of the model twice, with its optimizer")
    policy, held = (random_policy(bench, num_hidden_layers=layers) for _ in range(2))
    vocabulary, count, length = policy.model.config.vocab_size, 32, 16 if bench.is_small else 128
    engine = TorchEngine(held.model, max_running=count)
    publish(policy, engine, 0)
    how = SamplingParameters(temperature=1.0, max_new_tokens=length, stop_token_ids=())
    began = time.monotonic()
    made = list(engine.generate(requests(vocabulary, length, count), how))
    yield Number(name="layers", value=layers, at_least=1)
    rate = sum(len(one.completion_ids) for one in made) / (time.monotonic() - began)
    yield Number(name="tokens a second of 32 samples at once", value=rate)
    prompts = [r.prompt_ids for r in requests(vocabulary, length, 4)]
    scorer = Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=4096)
    gap = sampled_gap(engine, scorer, prompts)
    limit = FIRST[bench.dtype]
    yield Number(name="gap of engine and trainer", value=gap.size, unit="nats", at_most=limit)
    yield Number(name="tokens compared", value=gap.count, at_least=64)
    _step(policy, vocabulary)
    yield Number(name="stale engine found", value=_is_refused(policy, _Frozen(engine)), at_least=1)
    yield Number(name="fresh engine refused", value=_is_refused(policy, engine), at_most=0)


class _Frozen:
    """An engine that takes the version of the weights, and never the weights."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self.policy_version = engine, 0
        self.runs_beside_training, self.has_adapters = False, True

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Any:
        self.policy_version = version
        own = dict(self.engine.model.named_parameters())
        return replace(self.engine.publish(own, version), addresses={}, fingerprints=_prints(own))


def _prints(weights: Mapping[str, Tensor]) -> dict[str, int]:
    from truestep.rollout.fingerprints import fingerprint

    return {name: fingerprint(tensor) for name, tensor in weights.items()}


def _is_refused(policy: Policy, engine: Any) -> int:
    try:
        publish(policy, engine, 1)
    except StaleWeightsError:
        return 1
    return 0


def _step(policy: Policy, vocabulary: int, rate: float = RATE) -> None:
    optimizer = MasterOptimizer(policy, OptimizerSettings(lr=rate))
    accumulate(policy, batches_of(policy, documents(vocabulary, (17, 33)), 64))
    optimizer.step(optimizer.gradients(), rate)


def vllm(bench: Bench) -> Iterator[Number]:
    """A vLLM server must take new weights, prove that it has them, and be found out if it does not."""
    if not bench.vllm:
        raise Skip("no vLLM; pass --vllm with the Python of an environment that has it")
    installed_version(bench.vllm)
    heads: dict[str, Any] = (
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32} if bench.is_small else {}
    )
    policy = random_policy(bench, num_hidden_layers=2, vocab_size=128, **heads)  # 32: vLLM's smallest head
    with ExitStack() as stack:
        stack.enter_context(_variable(ENVIRONMENT, bench.vllm))
        folder = bench.folder
        untied_config(policy.model).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        copies = tied(policy.model)
        write_weights(folder, dict(policy.model.named_parameters()), copies)
        dtype = str(bench.dtype).removeprefix("torch.")
        server = VllmServer(
            model=str(folder), dtype=dtype, context_length=VLLM_TOKENS, max_running=16, trains=True,
            options=("--enforce-eager", "--block-size", "32") if bench.is_small else (),
        )  # fmt: skip
        began = time.monotonic()
        servers = stack.enter_context(Servers(server, say=lambda text: None))
        yield Number(name="seconds to start", value=time.monotonic() - began)
        abilities = {url: negotiate(client_of(url), dtype, VLLM_TOKENS) for url in servers.urls}

        def engine(make_wrong: Callable[[FileDelivery], None] = lambda delivery: None) -> VllmEngine:
            handed = FileDelivery(str(folder), abilities)
            make_wrong(handed)
            return VllmEngine(servers.urls, 16, Publisher(handed, folder, servers=servers, copies=copies))

        right = engine()
        began = time.monotonic()
        publish(policy, right, 0)
        yield Number(name="seconds to publish", value=time.monotonic() - began)
        scorer = Scorer(policy=policy, temperature=1.0, tokens_per_microbatch=4096)
        gap = SelfTest(policy, right, scorer, 0).run(lambda text: None)
        yield Number(
            name="gap of engine and trainer", value=gap.size, unit="nats", at_most=FIRST[bench.dtype]
        )
        for what, make_wrong in WRONG.items():
            _step(policy, policy.model.config.vocab_size)
            yield Number(name=f"found: {what}", value=_is_refused(policy, engine(make_wrong)), at_least=1)
        yield Number(name="right publishing refused", value=_is_refused(policy, engine()), at_most=0)


def _variable(name: str, value: str) -> Any:
    from unittest.mock import patch

    return patch.dict("os.environ", {name: value})


def no_update(delivery: FileDelivery) -> None:
    def load(client: Client, seconds: float, *, wakes: bool = False) -> dict[str, int]:
        delivery.asks(client, seconds)("/update_weight_version", {"new_version": str(delivery.version)})
        return dict(delivery.told)

    delivery.load = load  # type: ignore[method-assign]


def one_missing(delivery: FileDelivery) -> None:
    right = delivery.load

    def load(client: Client, seconds: float, *, wakes: bool = False) -> dict[str, int]:
        from safetensors.torch import load_file, save_file

        for path in Path(delivery.folder).glob("*.safetensors"):
            tensors = load_file(path)
            tensors.pop("model.layers.1.mlp.down_proj.weight", None)
            save_file(tensors, path, metadata={"format": "pt"})
        return right(client, seconds, wakes=wakes)

    delivery.load = load  # type: ignore[method-assign]


def cache_kept(delivery: FileDelivery) -> None:
    right = delivery.asks
    left_out: dict[str, Any] = {
        "/pause?mode=abort": {},
        "/reset_prefix_cache": {"success": True},
        "/resume": {},
    }

    def asks(client: Client, seconds: float) -> Callable[..., Any]:
        ask = right(client, seconds)
        return lambda path, body=None: left_out[path] if path in left_out else ask(path, body)

    delivery.asks = asks  # type: ignore[method-assign]


# Faulty ways to hand weights to a server.
WRONG = {
    "no update": no_update, "one tensor is missing": one_missing, "the prefix cache is kept": cache_kept,
}  # fmt: skip
