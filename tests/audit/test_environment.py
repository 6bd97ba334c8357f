"""Environments of audited releases: built once, by one process, whole or not at all. Installers here are
scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from truestep.audit.environments import virtual as environment
from truestep.errors import UserError

# Notes how it was called, does what UV_FAKE_DO says, "installs" every NAME==VERSION as an empty module with
# metadata.
FAKE_UV = """#!/bin/sh
echo "DS=$DS_BUILD_OPS LINKS=$UV_FIND_LINKS uv $*" >> "$UV_FAKE_LOG"
eval "$UV_FAKE_DO"
while [ "$1" != "--python" ]; do shift; done
site=$(echo "$(dirname "$(dirname "$2")")"/lib/python*/site-packages)
for word in "$@"; do case "$word" in *==*)
  name=${word%%==*}; version=${word##*==}
  info="$site/$name-$version.dist-info"
  mkdir -p "$info"
  printf 'Name: %s\\nVersion: %s\\n' "$name" "$version" > "$info/METADATA"
  echo "place = __file__" > "$site/$name.py";;
esac; done
"""
# Stands for a Python whose venv has pip.
FAKE_PYTHON = """#!/bin/sh
echo "DS=$DS_BUILD_OPS python $*" >> "$UV_FAKE_LOG"
if [ "$2" = venv ]; then
  for folder in "$@"; do :; done
  mkdir -p "$folder/bin" "$folder/lib/$UV_FAKE_LIB/site-packages"
  cp "$0" "$folder/bin/python"
fi
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a uv of the test's own; the file that the uv writes its calls to."""
    script(tmp_path / "bin" / "uv", FAKE_UV)
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_FAKE_LOG", str(log))
    monkeypatch.setenv("UV_FAKE_DO", "")
    monkeypatch.setattr(environment, "_uv_variables", dict)
    return log


def run_python(python: Path, code: str) -> str:
    return subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def start_build(text: str) -> subprocess.Popen[str]:
    code = f"from truestep.audit.environments import virtual as e\ne._uv_variables = dict\nprint(e.build({text!r}, say=print))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ the request


def test_a_request_is_exact_versions():
    assert environment.parse("deepspeed==0.18.9") == {"deepspeed": "0.18.9"}
    assert environment.parse(" TRL==1.16.0 + Deep_Speed==0.19.0rc1") == {
        "trl": "1.16.0",
        "deep-speed": "0.19.0rc1",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("deepspeed", "'deepspeed'"),
        ("deepspeed>=0.18", "'deepspeed>=0.18'"),
        ("deepspeed==0.18.*", "'deepspeed==0.18.*'"),
        ("trl==1.16.0+", "''"),
        ("trl==1.0+--index-url==1", "'--index-url==1'"),
        ("./trl==1.0", "'./trl==1.0'"),
        ("trl==1.0\n-r==1", "-r"),
        ("trl==1.0+TRL==1.1", "trl has two versions"),
    ],
)
def test_anything_else_is_refused_with_what_to_write(text: str, named: str):
    with pytest.raises(UserError) as caught:
        environment.plan(text)
    message = str(caught.value)
    assert named in message
    assert "; pass" in message
    assert "\n" not in message


def test_old_transformers_get_what_went_with_them():
    old = environment.plan("transformers==4.45.2").resolved
    assert {"accelerate==1.0.1", "huggingface-hub<1", "transformers==4.45.2"} == set(old)
    assert set(environment.plan("transformers==5.23.0").resolved) == {"accelerate", "transformers==5.23.0"}
    trl = set(environment.plan("trl==0.11.4").resolved)
    assert {"transformers==4.45.2", "peft==0.13.2", "datasets<4", "accelerate==1.0.1"} < trl
    assert set(environment.plan("trl==1.16.0").resolved) == {"trl==1.16.0"}


def test_a_version_that_is_asked_for_wins():
    plan = environment.plan("trl==0.11.4+transformers==4.46.3+accelerate==0.34.2")
    assert {"transformers==4.46.3", "accelerate==0.34.2", "peft==0.13.2"} < set(plan.resolved)
    assert not {"transformers==4.45.2", "accelerate==1.0.1"} & set(plan.resolved)
    mixed = environment.plan("openrlhf==0.10.2+transformers==4.46.3").resolved
    assert "accelerate==1.0.1" in mixed  # what openrlhf needs, in the release that fits these transformers
    assert "accelerate" not in mixed


def test_deepspeed_is_installed_alone_after_what_it_needs():
    plan = environment.plan("trl==1.16.0+deepspeed==0.18.9")
    assert plan.alone == ("deepspeed==0.18.9",)
    assert {"trl==1.16.0", "hjson", "psutil", "einops"} < set(plan.resolved)


def test_a_name_is_of_all_that_is_installed(monkeypatch: pytest.MonkeyPatch):
    name = environment.plan("trl==1.16.0+deepspeed==0.18.9").name
    assert name == environment.plan("deepspeed==0.18.9+trl==1.16.0").name
    assert name.startswith("deepspeed-0.18.9+trl-1.16.0-py3.")
    others = [
        "deepspeed==0.18.9",
        "trl==1.16.0+deepspeed==0.18.8",
        "torch==2.12.0+trl==1.16.0+deepspeed==0.18.9",
    ]
    assert len({name, *(environment.plan(text).name for text in others)}) == 4
    monkeypatch.setitem(environment.ALONE, "deepspeed", "hjson")
    assert environment.plan("trl==1.16.0+deepspeed==0.18.9").name != name


def test_the_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TRUESTEP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert environment.cache_folder() == tmp_path / ".cache" / "truestep" / "audit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environment.cache_folder() == tmp_path / "xdg" / "truestep" / "audit"
    monkeypatch.setenv("TRUESTEP_CACHE", "~/own")
    assert environment.cache_folder() == tmp_path / "own" / "audit"


def test_importing_it_needs_no_torch():
    code = "import truestep.audit.environments.virtual, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --------------------------------------------------------------------------------------------------- building


def test_uv_builds_the_base_once_and_an_overlay_for_each_subject(calls: Path):
    said: list[str] = []
    first = environment.build("deepspeed==0.18.9", say=said.append)
    base, needs, alone = calls.read_text().splitlines()
    assert f"torch=={environment.TORCH}" in base
    assert "setuptools<81" in base
    assert "psutil" in needs
    assert "--overrides" in needs
    assert "deepspeed==" not in needs
    assert alone.startswith("DS=0 ")
    assert {"--no-deps", "--no-build-isolation", "--no-cache", "deepspeed==0.18.9"} < set(alone.split())
    assert len(said) == 4
    assert environment.build("deepspeed==0.18.9", say=said.append) == first
    assert len(said) == 4
    second = environment.build("deepspeed==0.19.0")
    assert second != first
    added = calls.read_text().splitlines()[3:]
    assert len(added) == 2
    assert "torch==" not in "".join(added)
    assert environment.build(f"torch=={environment.TORCH}").parts[-3].startswith("base-torch-")
    assert len(calls.read_text().splitlines()) == 5


def test_an_overlay_sees_the_base_behind_its_own_packages(calls: Path, tmp_path: Path):
    python = environment.build("numpy==1.0+trl==1.16.0")
    home = python.parent.parent
    assert home.name in run_python(python, "import trl; print(trl.place)")
    assert "base-torch" in run_python(python, "import torch; print(torch.place)")
    base = next((tmp_path / "cache" / "audit").glob("base-*/lib/python*/site-packages"))
    (base / "numpy.py").write_text("place = __file__")
    assert home.name in run_python(python, "import numpy; print(numpy.place)")
    found = environment.versions(python)
    assert (found["trl"], found["torch"]) == ("1.16.0", environment.TORCH)
    assert environment.installed(python) == {"torch": environment.TORCH, "trl": "1.16.0"}
    moved = tmp_path / "moved"
    (tmp_path / "cache").rename(moved)
    assert "base-torch" in run_python(
        moved / "audit" / home.name / "bin/python", "import torch; print(torch.place)"
    )


def test_without_uv_pip_of_the_base_installs(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bin" / "uv").unlink()
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", FAKE_PYTHON)))
    monkeypatch.setenv("UV_FAKE_LIB", f"python{environment.PYTHON_TAG[2:]}")
    environment.build("deepspeed==0.18.9")
    venv, base, bare, needs, alone = calls.read_text().splitlines()
    assert "--without-pip" not in venv
    assert f"-m pip install --disable-pip-version-check torch=={environment.TORCH}" in base
    assert "--without-pip" in bare
    for line in (needs, alone):
        assert "-m pip --python" in line
        assert "deepspeed-0.18.9" in line
    assert "--constraint" in needs
    assert "deepspeed==" not in needs
    assert alone.startswith("DS=0 ")
    assert "--no-deps --no-build-isolation --no-cache-dir deepspeed==0.18.9" in alone
    home = next((tmp_path / "cache/audit").glob("deepspeed*/constraints.txt")).parent
    assert (home / "constraints.txt").read_text() == f"torch=={environment.TORCH}\n"


def test_a_failed_build_leaves_nothing_and_says_why_in_a_line(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environment.build(f"torch=={environment.TORCH}")
    message = (
        "echo looking; echo 'ERROR: no trl==9.9 at https://me:secret@index/simple'; echo 'hint: none'; exit 1"
    )
    monkeypatch.setenv("UV_FAKE_DO", message)
    with pytest.raises(environment.BuildFailed) as caught:
        environment.build("trl==9.9")
    text = str(caught.value)
    assert "no trl==9.9" in text
    assert "check" in text
    assert "secret" not in text
    assert "\n" not in text
    log = Path(text.rpartition("log: ")[2])
    assert "looking" in log.read_text()
    monkeypatch.setenv("UV_FAKE_DO", "")
    python = environment.build("trl==9.9")
    assert environment.installed(python)["trl"] == "9.9"
    assert not list((tmp_path / "cache/audit").glob("*.building"))


def test_an_installer_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "BUILD_TIMEOUT", 2.0)
    pid = tmp_path / "pid"
    began = time.monotonic()
    command = ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]
    with (
        (tmp_path / "lock").open("w") as lock,
        (tmp_path / "log").open("w") as log,
        pytest.raises(environment.BuildFailed, match=r"x: the installer did not end within 2 s"),
    ):
        environment._execute("x", log, lock.fileno(), command)
    wait_for(lambda: not _alive(int(pid.read_text())))
    assert time.monotonic() - began < 50, "it ended by itself"


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_killed_build_is_waited_for_and_done_again(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    environment.build(f"torch=={environment.TORCH}")
    gate, reached = tmp_path / "gate", tmp_path / "reached"
    monkeypatch.setenv("UV_FAKE_DO", f"touch {reached}; while [ ! -e {gate} ]; do sleep 0.02; done")
    killed = start_build("trl==1.16.0")
    wait_for(reached.exists)
    killed.kill()
    killed.communicate()
    folder = tmp_path / "cache" / "audit"
    half = next(folder.glob("trl*.building"))
    (half / "half-made").touch()
    said: list[str] = []
    done: list[Path] = []
    monkeypatch.setenv("UV_FAKE_DO", "")
    thread = threading.Thread(target=lambda: done.append(environment.build("trl==1.16.0", say=said.append)))
    thread.start()
    wait_for(lambda: any("waiting" in line for line in said))
    assert not done, "its installer is still writing"
    gate.touch()
    thread.join(20)
    assert environment.installed(done[0])["trl"] == "1.16.0"
    assert not (done[0].parent.parent / "half-made").exists()
    assert not list(folder.glob("*.building"))


def test_two_audits_build_an_environment_once(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UV_FAKE_DO", "sleep 0.3")
    both = [start_build("trl==1.16.0") for _ in range(2)]
    said = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [p.returncode for p in both] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert Path(said[0][-1]).exists()
    assert len(calls.read_text().splitlines()) == 2  # the base and the overlay


def test_waiting_for_another_audit_ends(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "BUILD_TIMEOUT", 0.3)
    folder = environment.cache_folder()
    folder.mkdir(parents=True)
    with environment._lock(folder / f"{environment.plan('trl==1.0').base_name}.lock", "x", print):  # noqa: SIM117
        with pytest.raises(environment.BuildFailed, match=r"TRUESTEP_CACHE"):
            environment.build("trl==1.0")
    assert not calls.read_text()


def test_a_cache_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(environment.BuildFailed, match=r"set TRUESTEP_CACHE"):
        environment.build("trl==1.0")


def test_an_environment_whose_interpreter_is_gone_is_built_again(calls: Path):
    python = environment.build("trl==1.16.0")
    python.unlink()
    python.symlink_to("/no/such/python")
    assert environment.build("trl==1.16.0") == python
    assert environment.installed(python)["trl"] == "1.16.0"


def test_uv_is_told_what_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = """
        global.find-links='/wheels'
        global.index-url='https://index/simple'
        global.extra-index-url='\\nhttps://a/simple\\nhttps://b/simple'
        :env:.find-links='/mine'
        install.no-binary='x'
    """
    fake = "#!/bin/sh\ncat <<'END'\n" + textwrap.dedent(config).strip() + "\nEND\n"
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", fake)))
    for name in ("UV_FIND_LINKS", "UV_DEFAULT_INDEX", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)
    told = environment._uv_variables()
    assert told["UV_FIND_LINKS"] == "/mine"
    assert told["UV_DEFAULT_INDEX"] == "https://index/simple"
    assert told["UV_INDEX"] == "https://a/simple https://b/simple"
    assert told["UV_INDEX_STRATEGY"] == "unsafe-best-match"  # as pip: all of its indexes are one
    assert len(told) == 4
    monkeypatch.setenv("UV_FIND_LINKS", "/uv")
    assert "UV_FIND_LINKS" not in environment._uv_variables()


# ------------------------------------------------------------------------------------------------- looking in


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The python of a user's environment."""
    home = tmp_path / "theirs"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    return home / "bin" / "python"


def tree(folder: Path) -> dict[str, int]:
    return {str(p): p.lstat().st_mtime_ns for p in folder.rglob("*")}


def test_frameworks_are_found_without_importing_or_writing(theirs: Path):
    site = next(theirs.parent.parent.glob("lib/python*/site-packages"))
    for name, version in (("Transformers", "5.23.0"), ("Some.Other_Thing", "1")):
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    for name in ("transformers", "trl"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "verl").mkdir()  # a folder that only has the name
    (site / "greeting.py").write_text("print('hello')\n")
    (site / "greeting.pth").write_text(
        "import greeting\n"
    )  # as an editable install: runs whenever this python starts
    before = tree(theirs.parent.parent)
    assert environment.installed(theirs) == {"transformers": "5.23.0", "trl": "unknown"}
    assert environment.versions(theirs) == {"transformers": "5.23.0", "some-other-thing": "1"}
    assert tree(theirs.parent.parent) == before


def test_what_the_caller_has_on_its_path_is_not_found(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "trl.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert environment.installed(theirs) == {}


def test_a_python_that_is_none_says_what_to_write(theirs: Path, tmp_path: Path):
    broken = script(tmp_path / "broken", "#!/bin/sh\necho 'no way' >&2\nexit 3\n")
    for path, expected in (
        (tmp_path / "absent", "no such program; pass the path"),
        (theirs.parent.parent, f"pass {theirs}"),
        (broken, "no way"),
        (script(tmp_path / "silent", "#!/bin/sh\n"), "does not run as Python"),
    ):
        with pytest.raises(UserError) as caught:
            environment.installed(path)
        assert expected in str(caught.value)
        assert "pass" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_orphan_check_can_fail():
    sleeper = subprocess.Popen(["sleep", "30"])
    assert _alive(sleeper.pid)
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    assert not _alive(sleeper.pid)
