"""Runs inside vLLM's worker processes: receives weights from the trainer, by vLLM's interface for that.

vLLM calls it for its routes /init_weight_transfer_engine, /start_weight_update, /update_weights and
/finish_weight_update if it is started with --weight-transfer-config '{"backend": "truestep"}'. Its own backends
exchange pickled objects.
Source: vLLM 0.32, distributed/weight_transfer/base.py. Held by: tests/rollout/test_vllm_rl.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from truestep_fingerprints import fingerprint  # type: ignore[import-not-found]
from truestep_tensor_group import TensorGroup  # type: ignore[import-not-found]
from vllm.distributed.weight_transfer.base import (  # type: ignore[import-not-found]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload  # type: ignore[import-not-found]


@dataclass
class Group(WeightTransferInitInfo):
    """Where the trainer's store is, and how many processes meet there."""

    host: str
    port: int
    size: int
    seconds: float


@dataclass
class Tensors(WeightTransferUpdateInfo):
    """The tensors that the trainer sends, in order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


class Transfer(WeightTransferEngine):
    """``received`` are the fingerprints of the last update's tensors, as they were given to the model."""

    init_info_cls, update_info_cls = Group, Tensors
    group: Any = None

    def init_transfer_engine(self, init_info: Group) -> None:
        own = self.parallel_config
        rank = 1 + own.data_parallel_index * own.world_size + own.rank  # the trainer is 0
        self.group = TensorGroup(init_info.host, init_info.port, rank, init_info.size, init_info.seconds)
        self.group.meet(torch.device(self.device))

    def start_weight_update(self) -> None:
        self.received: dict[str, int] = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Tensors) -> None:
        told = zip(update_info.names, update_info.dtypes, update_info.shapes, strict=True)
        for name, dtype, shape in told:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            self.group.broadcast(tensor)
            self.received[name] = fingerprint(tensor)
            self.model.load_weights([(name, tensor)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.group = None
