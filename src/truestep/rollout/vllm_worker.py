"""Runs inside vLLM's worker processes: loads weights from a folder, and says which bits it loaded.

vLLM calls it by its option --worker-extension-cls. Its environment does not contain truestep, so a copy of this
file and of fingerprints.py is put on its PYTHONPATH. Both import nothing of the package.
Held by: tests/rollout/test_vllm_rl.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # type: ignore[import-not-found]

WeightTransferEngineFactory.register_engine("truestep", "truestep_vllm_transfer", "Transfer")


class Receiver:
    """Methods that are added to vLLM's worker class; ``model_runner`` is the worker's."""

    model_runner: Any
    weight_transfer_engine: Any

    def truestep_received(self) -> dict[str, int]:
        """Return the fingerprint of every tensor of the last weight transfer, as it was given to the model."""
        return dict(self.weight_transfer_engine.received)

    def truestep_load(self, folder: str) -> dict[str, int]:
        """Load the weights in a folder. Return the fingerprint of every tensor that was given to the model."""
        from safetensors import safe_open
        from truestep_fingerprints import fingerprint  # type: ignore[import-not-found]

        found: dict[str, int] = {}
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} has no weights that the server can read; set vllm.folder")

        def tensors() -> Iterator[tuple[str, Any]]:
            for path in files:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        tensor = file.get_tensor(name)
                        found[name] = fingerprint(tensor)
                        yield name, tensor

        # It prepares the layers for new weights and packs them afterwards, as after the start.
        self.model_runner.reload_weights(weights_iterator=tensors())
        return found
