"""Publishing a policy with adapters: an adapter that does not reach the engine's samples is found, for the torch engine
and for a server of vLLM (a stand-in that reads the files it is told to load)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_vllm_protocol import StandIn, config, sampled
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from truestep.model.load import LoadedModel, model_shape, prepare
from truestep.model.lora import install, layers_of, merged
from truestep.model.tiny import tiny_tokenizer
from truestep.rollout.engine import StaleWeightsError
from truestep.rollout.engine_torch import TorchEngine
from truestep.rollout.engine_vllm import Publisher, VllmEngine
from truestep.rollout.fingerprints import fingerprint
from truestep.rollout.vllm_weights import ROUTES, Abilities, FileDelivery
from truestep.stage_settings import LoraSettings
from truestep.train import weight_sync
from truestep.train.policy import Policy
from truestep.train.weight_sync import publish

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(params=DTYPES, ids=str)
def trained(request: pytest.FixtureRequest) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False,
            )
        ).to(request.param)  # fmt: skip
    prepare(model, torch.device("cpu"))
    install(model, LoraSettings(rank=2, targets=("all-linear", "lm_head")), 0)
    loaded = LoadedModel(model=model, tokenizer=tiny_tokenizer(), shape=model_shape(model), context_length=64)
    policy = Policy(loaded)
    update(policy)
    return policy


@torch.no_grad()
def update(policy: Policy, size: float = 0.02) -> None:
    """Move the adapters, as a step does."""
    draw = torch.Generator().manual_seed(
        int(1e6 * float(policy.model.lm_head.lora_B.detach().float().sum())) % 999
    )
    for layer in layers_of(policy.model).values():
        for part in (layer.lora_A, layer.lora_B):
            part += size * torch.randn(part.shape, generator=draw).to(part)


# ----------------------------------------------------------------------------------------------------- torch engine


class OwnCopy(TorchEngine):
    """An engine in another process: a separate model, which ``wrong`` changes after a right load."""

    def __init__(self, policy: Policy, wrong: Callable[[Any, Tensors], None] | None = None) -> None:
        super().__init__(copy.deepcopy(policy.model))
        self.wrong, self.before = wrong, dict[str, Tensor]()

    @torch.no_grad()
    def load(self, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, int]:
        given = {name: weights[name].clone() for name in weights}
        super().load(own, given)
        if self.wrong is not None and self.before:
            self.wrong(self.model, self.before)
        self.before = given
        return {}


def not_applied(model: Any, before: Tensors) -> None:
    for layer in layers_of(model).values():
        layer.is_on = False


def merged_twice(model: Any, before: Tensors) -> None:
    for layer in layers_of(model).values():
        layer.weight.copy_(merged(layer.scale, layer.weight, layer.lora_A, layer.lora_B))


def dropped(model: Any, before: Tensors) -> None:
    for layer in layers_of(model).values():
        layer.lora_B.zero_()


def of_the_previous_step(model: Any, before: Tensors) -> None:
    for name, layer in layers_of(model).items():
        layer.lora_A.copy_(before[f"{name}.lora_A"])
        layer.lora_B.copy_(before[f"{name}.lora_B"])


def another_scale(model: Any, before: Tensors) -> None:
    layers_of(model)[LAYER].scale *= 2


WRONG = (not_applied, merged_twice, dropped, of_the_previous_step, another_scale)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_torch_engine_is_found_out(trained: Policy, wrong: Any) -> None:
    engine = OwnCopy(trained, wrong)
    publish(trained, engine, 0)
    update(trained)
    with pytest.raises(StaleWeightsError, match="does not have it"):
        publish(trained, engine, 1)


def test_a_right_torch_engine_is_accepted(trained: Policy) -> None:
    for engine in (OwnCopy(trained), TorchEngine(trained.model)):
        for version in range(3):
            publish(trained, engine, version)
            update(trained)


def test_an_engine_on_the_trainers_module_must_have_its_adapters_on(trained: Policy) -> None:
    engine = TorchEngine(trained.model)
    layers_of(trained.model)[LAYER].is_on = False
    with pytest.raises(StaleWeightsError, match=LAYER):
        publish(trained, engine, 1)


# ------------------------------------------------------------------------------------------------------------- vLLM


class Loading(StandIn):
    """Loads the files of the folder that it is told, or what ``wrong`` makes of them, and tells its fingerprints."""

    folder: Path
    wrong: Callable[[Tensors], Tensors] | None = None


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    def load(body: Any) -> dict[str, Any]:
        found: Tensors = {}
        for path in sorted(Path(body["kwargs"]["folder"]).glob("*.safetensors")):
            found |= load_file(path)
        if Loading.wrong is not None:
            found = Loading.wrong(found)
        return {"results": [{name: fingerprint(tensor) for name, tensor in found.items()}]}

    Loading.wrong, Loading.lost = None, 0
    Loading.said.clear()
    version = {"value": "0"}

    def renamed(body: Any) -> dict[str, Any]:
        version["value"] = body["new_version"]
        return {}

    Loading.answers = {
        "/version": {"version": "0.32.1"}, "/openapi.json": {"paths": dict.fromkeys(ROUTES, 1)},
        "/server_info?config_format=json": config(), "/collective_rpc": load, "/update_weight_version": renamed,
        "/reset_prefix_cache": {"success": True}, "/inference/v1/generate": sampled,
        "/weight_info": lambda body: {"weight_version": version["value"]},
    }  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), Loading)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def engine_of(url: str, folder: Path) -> VllmEngine:
    delivery = FileDelivery(str(folder), {url: Abilities(version="0.32.1", tells_bits=True)})
    return VllmEngine([url], 4, Publisher(delivery, folder))


def at_server(policy: Policy, name: str) -> Callable[[Tensors], Tensors]:
    """Return what a server holds with a faulty adapter, from what it was given."""
    layers = {f"{n}.weight": layer for n, layer in layers_of(policy.model).items()}
    old = {n: merged(one.scale, one.weight, one.lora_A, one.lora_B).clone() for n, one in layers.items()}

    def changed(given: Tensors) -> Tensors:
        base = {n: one.weight.detach() for n, one in layers.items()}
        twice = {n: merged(one.scale, given[n], one.lora_A, one.lora_B) for n, one in layers.items()}
        one_dropped = {f"{LAYER}.weight": base[f"{LAYER}.weight"]}
        return given | {"not merged": base, "twice": twice, "dropped": one_dropped, "previous": old}[name]

    return changed


@pytest.mark.parametrize("name", ["not merged", "twice", "dropped", "previous"])
def test_a_server_with_a_wrong_adapter_is_found(trained: Policy, url: str, tmp_path: Path, name: str) -> None:
    engine = engine_of(url, tmp_path)
    publish(trained, engine, 0)
    Loading.wrong = at_server(trained, name)
    update(trained)
    with pytest.raises(StaleWeightsError, match="does not have it"):
        publish(trained, engine, 1)


def test_a_right_server_is_given_merged_weights(trained: Policy, url: str, tmp_path: Path) -> None:
    engine = engine_of(url, tmp_path)
    for version in range(3):
        receipt = publish(trained, engine, version)
        assert not any("lora" in name for name in receipt.fingerprints)
        update(trained)


def base_only(scale: float, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return weight


def doubled(scale: float, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return merged(2 * scale, weight, first, second)


def rounded_twice(scale: float, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return weight + (scale * (second @ first)).to(torch.bfloat16).to(weight.dtype)


def kept() -> Callable[..., Tensor]:
    """Merges with the adapters of the first call, of each layer."""
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def merge(scale: float, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        old = held.setdefault(weight.data_ptr(), (first.clone(), second.clone()))
        return merged(scale, weight, *old)

    return merge


@pytest.mark.parametrize("make", [lambda: base_only, lambda: doubled, lambda: rounded_twice, kept],
                         ids=["not merged", "twice", "rounded twice", "previous"])  # fmt: skip
def test_a_wrong_merge_of_the_trainer_is_found(
    trained: Policy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    """The server holds what it was given, bit for bit; only that is not the policy."""
    engine, merge = engine_of(url, tmp_path), make()
    publish(trained, engine, 0)
    monkeypatch.setattr(weight_sync, "merged", merge)
    if make is kept:
        publish(trained, engine, 1)
    update(trained)
    with pytest.raises(StaleWeightsError, match=r"self_attn|mlp|lm_head"):
        publish(trained, engine, 2)
