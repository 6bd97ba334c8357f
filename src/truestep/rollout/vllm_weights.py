"""Gives weights to vLLM servers as files in a folder that the servers can read, and asks what servers can do.

The folder is a Hugging Face model folder, from which a server can also be started. By default it lies in shared
memory (/dev/shm), so nothing is written to a disk. While weights change, a server is paused and its requests are
dropped; its prefix cache is reset before it goes on, because that has keys and values of the old weights.

vLLM's routes differ between its versions, so a server of another version than the tested ones is refused.
Source: vLLM 0.32, entrypoints/rl/online/api_router.py and entrypoints/serve/dev/.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import OutOfSpace, UserError
from truestep.http_client import BadAnswer, Client
from truestep.rollout.engine import StaleWeightsError

if TYPE_CHECKING:
    from torch import Tensor

TESTED, BELOW = (0, 32), (0, 33)  # versions of vLLM
FILE_BYTES = 1 << 30  # of one file of weights, so that only this much is copied in memory at once
PREFIX, LOCK = "truestep-weights-", "in-use"
PROBE_TOKEN, PROBE_LENGTH = 3, 288  # more than two blocks of any cache
SLEEP_SECONDS = 120.0
SHARED_MEMORY = Path("/dev/shm")
ROUTES = ("/collective_rpc", "/pause", "/resume", "/reset_prefix_cache", "/update_weight_version",
          "/weight_info", "/inference/v1/generate")  # fmt: skip
START = "truestep vllm MODEL (or VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs)"


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a server can do, as it says itself. ``tells_bits``: it has truestep's worker extension."""

    version: str
    tells_bits: bool
    length: int = 2  # tokens that it takes
    workers: int = 1  # processes that have weights
    transfer: str = ""  # its backend of weight transfer
    device: str = ""  # its kind: "cpu"; "" if it does not say


def require_server(client: Client) -> str:
    """Return a server's version of vLLM. Raises UserError, which says what to start, if RL is not possible with it."""
    where = f"the vLLM server {client.base}"
    try:
        version, paths = str(client.ask("/version")["version"]), set(client.ask("/openapi.json")["paths"])
    except (OSError, BadAnswer, LookupError, TypeError) as error:
        said = client.words(error)
        raise UserError(f"{where} cannot be asked what it can do ({said}); start it as {START}") from None
    require_version(version, f"{where} is version {client.words(version)}")
    if missing := [route for route in ROUTES if route not in paths]:
        raise UserError(f"{where} does not offer {missing[0]}; start it as {START}")
    return version


def require_version(version: str, where: str) -> None:
    """Raise UserError for a version of vLLM that was not tested."""
    if not _is_tested(version):
        known = ".".join(map(str, TESTED))
        raise UserError(
            f"{where}; RL needs {known} (weights are published by routes that change between versions): "
            f"pip install 'vllm=={known}.*'"
        )


def negotiate(client: Client, dtype: str, context_length: int) -> Abilities:
    """Ask a server what it can do. Raises UserError, which says what to start, if it does not fit the run."""
    where, version = f"the vLLM server {client.base}", require_server(client)
    try:
        config = client.ask("/server_info?config_format=json")["vllm_config"]
        model, parallel = config["model_config"], config["parallel_config"]
        mode, kind, length = str(model["logprobs_mode"]), str(model["dtype"]), int(model["max_model_len"])
    except (OSError, BadAnswer, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} does not tell its settings ({client.words(error)}); start it as {START}"
        ) from None
    if mode != "processed_logprobs":
        raise UserError(
            f"{where} gives {client.words(mode)}; start it with --logprobs-mode processed_logprobs"
        )
    if (kind := kind.removeprefix("torch.")) != dtype:
        raise UserError(
            f"{where} computes in {client.words(kind)}, but compute.dtype is {dtype}; set one of them"
        )
    if length < context_length:
        raise UserError(
            f"{where} takes {length} tokens; start it with --max-model-len {context_length}, or set a smaller "
            "sampling.max_new_tokens"
        )
    named, device = str(parallel.get("worker_extension_cls") or ""), config.get("device_config") or {}
    return Abilities(
        version=version, tells_bits=named.endswith("truestep_vllm_worker.Receiver"), length=length,
        workers=int(parallel.get("world_size", 1)) * int(parallel.get("data_parallel_size", 1)),
        transfer=str((config.get("weight_transfer_config") or {}).get("backend") or ""),
        device=str(device.get("device_type") or device.get("device") or "").partition(":")[0],
    )  # fmt: skip


def _is_tested(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and TESTED <= (int(found[1]), int(found[2])) < BELOW


@contextmanager
def weights_folder(where: str, num_bytes: int, largest: int = 0) -> Iterator[Path]:
    """Make an empty folder for weights, the largest tensor of which has ``largest`` bytes, and remove it finally.
    Raises OutOfSpace if there is too little room."""
    parent = (
        Path(where) if where else SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    )
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(parent)
        free = shutil.disk_usage(parent).free
        # New files replace old ones only when they are complete, so up to one file is there twice.
        if free < (needed := num_bytes + max(FILE_BYTES, largest)):
            raise OutOfSpace(
                f"{parent} has {free / 2**30:.1f} GiB free, but the weights for vLLM need "
                f"{needed / 2**30:.1f}; set vllm.folder to a folder with more"
            )
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise UserError(f"vllm.folder = {str(parent)!r} cannot be used: {error.strerror}") from None
    try:
        with (folder / "new").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / LOCK)  # so it is never there without being held
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_over(parent: Path) -> None:
    """Remove the weights of runs that were killed. A run that goes on, on any machine, holds a lock."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / LOCK).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError if it is held
            shutil.rmtree(folder, ignore_errors=True)


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    copies: Mapping[str, str] | None = None,
    *,
    writes: bool = True,
    send: Callable[[Tensor], None] | None = None,
) -> None:
    """Write all weights as safetensors files. ``copies`` maps a name to a second one under which the tensor is
    written, too. A process with ``writes`` False only takes part in the gathering of sharded weights. ``send`` is
    given each tensor as often as it would be written."""
    from safetensors.torch import save_file

    batch: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        path = folder / f"model-{number:05d}.safetensors"
        save_file(batch, path.with_suffix(".part"), metadata={"format": "pt"})
        path.with_suffix(".part").replace(path)
        number += 1
        batch.clear()

    for name in weights:
        tensor = weights[name]
        for written in filter(None, (name, (copies or {}).get(name))):
            if send is not None:
                send(tensor)
            if not writes:
                continue
            if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > FILE_BYTES:
                flush()
            batch[written] = tensor.detach().cpu().contiguous().clone()
    if writes:
        flush()


@dataclass
class FileDelivery:
    """Makes servers load the weights in ``folder``. ``version`` is the newest that was written there."""

    folder: str
    abilities: Mapping[str, Abilities]  # by address
    version: int = 0
    told: dict[str, int] = field(default_factory=dict)  # fingerprints that all servers told for this version

    def load(self, client: Client, seconds: float, *, wakes: bool = False) -> dict[str, int]:
        """Make one server load the weights, and reset its prefix cache. Return the fingerprints that it tells.
        If ``wakes``, the server may sleep; its cache gets memory only after the weights.

        Raises OSError if the server does not answer, BadAnswer if it refuses, and StaleWeightsError if it has another
        version or an old cache."""
        ask = self.asks(client, seconds)
        self.pause(ask, wakes=wakes)
        call: dict[str, Any] = {"method": "truestep_load", "kwargs": {"folder": self.folder}}
        if not self.abilities[client.base].tells_bits:
            call = {"method": "reload_weights", "kwargs": {"weights_path": self.folder}}
        results = ask("/collective_rpc", call)["results"]
        ask("/update_weight_version", {"new_version": str(self.version)})
        return self.resume(client, ask, results, wakes=wakes)

    def pause(self, ask: Callable[..., Any], *, wakes: bool) -> None:
        """Make a server drop its requests and take no others. If ``wakes``, it gets memory for the weights."""
        ask("/pause?mode=abort", {})
        if wakes:
            ask("/wake_up?tags=weights", {})

    def resume(
        self, client: Client, ask: Callable[..., Any], results: list[dict[str, int]], *, wakes: bool
    ) -> dict[str, int]:
        """Make a server with new weights reset its cache and take requests. Return the fingerprints that its workers
        told in ``results``."""
        if wakes:
            ask("/wake_up?tags=kv_cache", {})
        if ask("/reset_prefix_cache", {})["success"] is not True:
            raise StaleWeightsError("the vLLM server did not reset its prefix cache")
        if (said := ask("/weight_info")["weight_version"]) != str(self.version):
            raise StaleWeightsError(f"the vLLM server says that it has version {said}, not {self.version}")
        ask("/resume", {})
        able = self.abilities[client.base]
        self._require_empty_cache(ask, able.length)
        return _same(results) if able.tells_bits else {}

    def _require_empty_cache(self, ask: Callable[..., Any], length: int) -> None:
        """Raise StaleWeightsError if a prompt, the same after every update, comes from the cache of older weights."""
        prompt = [PROBE_TOKEN] * min(PROBE_LENGTH, length - 1)
        sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        answer = ask("/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling})
        if (cached := num_cached(answer)) > 0:
            raise StaleWeightsError(
                f"the vLLM server has kept {cached} of {len(prompt)} tokens of a prompt in its cache"
            )

    def asks(self, client: Client, seconds: float) -> Callable[..., Any]:
        """Return the function that asks a server: path, and body or None → answer."""
        return replace(client, seconds=seconds).ask

    def sleep(self, client: Client) -> None:
        """Make one server move its weights to host memory and give up its cache."""
        self.asks(client, SLEEP_SECONDS)("/sleep?level=1", {})


def num_cached(answer: Mapping[str, Any]) -> int:
    """Return how many tokens of the prompt came from the prefix cache, if the server tells, or 0."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _same(results: list[dict[str, int]]) -> dict[str, int]:
    """Return the fingerprints that all workers of a server told. If they differ, it is −1, which none has."""
    first, *others = results
    return {
        name: int(value) if all(one.get(name) == value for one in others) else -1
        for name, value in first.items()
    }


Gather = Callable[[Any], list[Any]]
