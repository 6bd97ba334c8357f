"""What is read again is what was written: a flipped bit anywhere is an error in one line or is repaired. One
process at a time works in a run directory, and what killed writers left is removed."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import differing, files, fingerprint, go, interrupted_at, prepared, write_recipe

from truestep import rundir
from truestep.cli import main as cli
from truestep.cli.main import main
from truestep.errors import UserError
from truestep.model.load import load_model, model_content
from truestep.pipeline.prepare import Prepared
from truestep.settings import ModelSettings
from truestep.signals import Interrupted
from truestep.train.logs import NAMES, StageLogs, read_log

torch.set_num_threads(1)
PACKAGE = str(Path(rundir.__file__).resolve().parents[1])


def flips(path: Path) -> Iterator[bytes]:
    """The file with each of its bits flipped, one after the other."""
    data = bytearray(path.read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        yield bytes(data)
        data[bit // 8] ^= 1 << bit % 8


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # a stage that was copied by a study is hard-linked
    path.write_bytes(data)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def made(recipe: Path) -> Prepared:
    return prepared(recipe)


@pytest.fixture(scope="module")
def whole(made: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(made, folder)
    return folder


@pytest.fixture(scope="module")
def half(made: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted between two steps of the RL stage."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        alarm = interrupted_at(patch, 10**9)
        go(made, folder)
    at = [i for i, look in enumerate(alarm.looks) if look == "step"][-2]
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, at)
        with pytest.raises(Interrupted):
            go(made, folder)
    return folder


# ------------------------------------------------------------------------------------------------- JSON


def test_every_flipped_bit_of_a_json_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    value, seen = {"identity": "ab12", "steps": 12, "shares": [1e-9, None, True], "text": "ü\n"}, 0
    rundir.write_json(path, value)
    assert rundir.read_json(path) == value
    for data in flips(path):
        path.write_bytes(data)
        try:
            assert rundir.read_json(path) == value, data  # the same number or space in another spelling
        except UserError as error:
            seen += "done.json" in str(error)
    assert seen > 0.9 * 8 * len(data)


def test_a_json_file_without_a_hash_is_read(tmp_path: Path) -> None:
    for value in ({"a": 1}, {}, [1], "text", {"sha1": "0" * 40}):
        (tmp_path / "old.json").write_text(json.dumps(value))
        assert rundir.read_json(tmp_path / "old.json") == value


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"identity": 5}', "{}", "\x00", "[" * 100_000, '"\udc80"']
)
def test_any_done_json_is_one_line(recipe: Path, whole: Path, tmp_path: Path, capsys: Any, text: str) -> None:
    shutil.copytree(whole, tmp_path / "run")
    done = tmp_path / "run/stages/01-sft/done.json"
    done.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_one_line(capsys, done, "run", recipe, "--out", tmp_path / "run", "--resume")


def assert_one_line(capsys: Any, names: Path, *words: object, code: int = 2) -> str:
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["truestep", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (stopped.value.code, last[:7]) == (code, "error: ")
    assert str(names) in last
    return last


# ------------------------------------------------------------------------------------------------- logs


def test_every_flipped_bit_of_a_log_is_an_error(tmp_path: Path) -> None:
    logs = StageLogs(tmp_path)
    for step in (1, 2, 3):
        logs.append("metrics.jsonl", [{"step": step, "sft/loss": 0.5 * step}])
    record = logs.seal()
    rundir.write_json(tmp_path / "done.json", {"files": record})
    path = tmp_path / "metrics.jsonl"
    intact = path.read_bytes()
    for data in flips(path):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            StageLogs(tmp_path).restore(record)
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            read_log(tmp_path, "metrics.jsonl")
    lines = intact.splitlines(keepends=True)
    for lost in range(3):
        path.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
        with pytest.raises(UserError, match="delete"):
            StageLogs(tmp_path).restore(record)
    path.unlink()
    with pytest.raises(UserError, match="delete"):
        StageLogs(tmp_path).restore(record)


def test_a_log_is_continued_from_its_record(tmp_path: Path) -> None:
    """What was written after the record is cut off, and the next record is that of an uninterrupted stage."""
    one, other = StageLogs(tmp_path / "one"), StageLogs(tmp_path / "other")
    for logs in (one, other):
        logs.append("rollouts.jsonl", [{"step": 1, "completion": "ü"}])
    record = one.seal()
    one.append("rollouts.jsonl", [{"step": 2, "completion": "lost"}])
    again = StageLogs(tmp_path / "one")
    again.restore(record)
    for logs in (again, other):
        logs.append("rollouts.jsonl", [{"step": 2, "completion": "kept"}])
    assert again.seal() == other.seal()
    assert rundir.read_jsonl(tmp_path / "one/rollouts.jsonl")[-1]["completion"] == "kept"


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_refuses_a_damaged_log(made: Prepared, half: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(half, tmp_path / "run")
    path = tmp_path / "run/stages/02-rl" / name
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"{name}.*delete"):
        go(made, tmp_path / "run", resume=True)
    assert path.read_bytes() == before


def test_the_middle_of_a_log_is_never_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rundir.append_jsonl(path, [{"step": 1}, {"step": 2}, {"step": 3}])
    with path.open("a") as file:
        file.write('{"step": 4')  # cut off by a kill
    assert [row["step"] for row in rundir.read_jsonl(path)] == [1, 2, 3]
    for text in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n\n{"step": 3}\n', '{"step": 1}\n7\n'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"x\.jsonl:2"):
            rundir.read_jsonl(path)


# ------------------------------------------------------------------------------------- model folders


def test_a_flipped_bit_between_two_stages_is_an_error(made: Prepared, half: Path, tmp_path: Path) -> None:
    """The second stage must not start from changed weights, a changed tokenizer or a changed template."""
    draw = random.Random(0)
    names = [p.name for p in files(half / "stages/01-sft/export") if p.name != "README.md"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "truestep_export.json"} <= set(names)
    for name in names:
        run = tmp_path / name
        shutil.copytree(half, run)
        flip(run / "stages/01-sft/export" / name, draw)
        with pytest.raises(UserError, match=name):
            go(made, run, resume=True)


def test_a_finished_run_is_verified_to_its_last_export(made: Prepared, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    for number, stage in enumerate(("01-sft", "02-rl")):
        shutil.copytree(whole, run := tmp_path / str(number))
        flip(run / "stages" / stage / "export/tokenizer.json", draw)
        with pytest.raises(UserError, match=r"tokenizer\.json is not what was written"):
            go(made, run, resume=True)


@pytest.mark.parametrize("lost", ["", rundir.EXPORT_MARK, "model.safetensors"])
def test_what_the_error_of_a_lost_export_advises_works(
    made: Prepared, half: Path, whole: Path, tmp_path: Path, lost: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    stage = run / "stages/01-sft"
    shutil.rmtree(stage / "export") if not lost else (stage / "export" / lost).unlink()
    with pytest.raises(UserError, match=f"restore it, or delete {stage} and run the same command again"):
        go(made, run, resume=True)
    shutil.rmtree(stage)
    go(made, run, resume=True)
    assert differing(fingerprint(run), fingerprint(whole)) == []


def test_an_exported_model_is_verified_wherever_it_is(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole / "stages/02-rl/export", folder)
    settings = ModelSettings(path=str(folder))
    kept = model_content(settings)
    (folder / "README.md").write_text("notes of its owner")
    assert model_content(settings) == kept
    flip(folder / "model.safetensors", random.Random(1))
    for use in (model_content, loaded):
        with pytest.raises(UserError, match=r"model\.safetensors.*delete .*truestep_export"):
            use(settings)
    (folder / rundir.EXPORT_MARK).unlink()  # on purpose
    assert model_content(settings) != kept


def loaded(settings: ModelSettings) -> Any:
    return load_model(settings, dtype=torch.float32, device=torch.device("cpu"), seed=0)


@pytest.fixture
def plain(whole: Path, tmp_path: Path) -> ModelSettings:
    """A model folder that truestep did not export."""
    shutil.copytree(whole / "stages/02-rl/export", tmp_path / "model")
    (tmp_path / "model" / rundir.EXPORT_MARK).unlink()
    return ModelSettings(path=str(tmp_path / "model"))


def edited(settings: ModelSettings, change: Any) -> None:
    path = Path(settings.path) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), f"do not contain {NORM}"),
        (lambda t: t.update({NORM: torch.ones(5)}), f"shape differs from config.json for {NORM}"),
        (lambda t: t.update({"model.layers.7.extra": torch.ones(5)}), "no place for model.layers.7.extra"),
    ],
    ids=["missing", "mis-shaped", "unexpected"],
)
def test_a_tensor_that_does_not_fit_is_an_error(plain: ModelSettings, change: Any, words: str) -> None:
    loaded(plain)
    edited(plain, change)
    with pytest.raises(UserError, match=words):
        loaded(plain)


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_tensor_may_be_missing(plain: ModelSettings, tied: bool) -> None:
    path = Path(plain.path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tied}))
    edited(plain, lambda tensors: tensors.pop("lm_head.weight", None))
    if tied:
        model = loaded(plain).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    else:
        with pytest.raises(UserError, match=r"lm_head\.weight"):
            loaded(plain)


def test_weights_in_bin_are_part_of_the_identity(plain: ModelSettings) -> None:
    folder = Path(plain.path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    found = []
    for change in (0.0, 1.0):
        tensors[NORM] = tensors[NORM] + change
        torch.save(tensors, folder / "pytorch_model.bin")
        found.append(model_content(plain))
    assert found[0] != found[1]
    assert torch.equal(loaded(plain).model.model.norm.weight.detach(), tensors[NORM])


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("model.safetensors.index.json", "part.safetensors"),
        ("model.safetensors.index.json", "sub/part.safetensors"),
        ("model.safetensors.index.json", "../part.safetensors"),
        ("pytorch_model.bin.index.json", "weights.pt"),
        ("pytorch_model.bin.index.json", "sub/deep/weights.bin"),
        ("config.json", "sub/part.safetensors"),
        ("sub/own.safetensors.index.json", "sub/part.safetensors"),
    ],
)
def test_weights_that_a_file_names_are_part_of_the_identity(
    plain: ModelSettings, index: str, part: str
) -> None:
    folder = Path(plain.path)
    (folder / part).parent.mkdir(parents=True, exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "sub").mkdir(exist_ok=True)
    if index.startswith(("config", "sub/")):
        config = json.loads((folder / "config.json").read_text())
        named = part if index == "config.json" else index
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    if index != "config.json":
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, part)}))
    found = []
    for change in (0.0, 1.0):
        tensors[NORM] = tensors[NORM] + change
        if part.endswith(".safetensors"):
            save_file(tensors, folder / part, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / part)
        found.append(model_content(plain))
        assert torch.equal(loaded(plain).model.model.norm.weight.detach(), tensors[NORM])
    (folder / "sub/notes.txt").write_text("no index names this file")
    assert model_content(plain) == found[1] != found[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": 5}', '{"weight_map": {"a": 5, "b": "missing", "c": "."}}']
)
def test_an_index_that_cannot_be_read_does_not_stop_the_identity(plain: ModelSettings, text: str) -> None:
    kept = model_content(plain)
    (Path(plain.path) / "model.safetensors.index.json").write_text(text)
    assert model_content(plain) != kept


class Harmless:
    pass


def test_a_pickle_of_other_objects_is_refused_in_our_words(plain: ModelSettings) -> None:
    folder = Path(plain.path)
    (folder / "model.safetensors").unlink()
    torch.save({NORM: Harmless()}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"Python objects in them, which are never run; use .*safetensors"
    ) as caught:
        loaded(plain)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "x.gguf"]
)
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x00\x01garbage", b'{"model_type": 5}', b"\xff{"])
def test_any_model_file_is_one_line(
    plain: ModelSettings, recipe: Path, tmp_path: Path, capsys: Any, name: str, content: bytes
) -> None:
    folder = Path(plain.path)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    path = folder / name if name.endswith(".gguf") else folder
    words = ("--out", tmp_path / "out", "--set", f"model.path={path}")
    assert_one_line(capsys, path, "run", recipe, *words)


# -------------------------------------------------------------------------------- lock and leftovers

HOLDER = """
import os, sys, time
from pathlib import Path
from truestep.rundir import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a child that outlives its parent must not keep the lock
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time(recipe: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    words = [sys.executable, "-c", HOLDER, str(folder)]
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, start_new_session=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = {p: p.read_bytes() for p in files(folder)}
        said = assert_one_line(capsys, folder, "run", recipe, "--out", folder, "--resume")
        assert f"process {holder.pid} on " in said
        assert {p: p.read_bytes() for p in files(folder)} == before
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with rundir.locked(folder):
            assert f"process {os.getpid()} on " in (folder / rundir.LOCK).read_text()
        os.killpg(holder.pid, signal.SIGKILL)
    assert (folder / rundir.LOCK).read_text() == ""


def link_to(lock: Path, kept: Path) -> None:
    lock.symlink_to(kept)


NO_LOCKS: dict[str, Any] = {
    "symbolic link": link_to,
    "link to nothing": lambda lock, kept: lock.symlink_to(kept.with_name("new")),
    "hard link": lambda lock, kept: os.link(kept, lock),
    "pipe": lambda lock, kept: os.mkfifo(lock),
    "folder": lambda lock, kept: lock.mkdir(),
    "device": lambda lock, kept: lock.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", NO_LOCKS)
def test_a_lock_that_is_not_an_ordinary_file_is_refused(tmp_path: Path, kind: str) -> None:
    kept, lock = tmp_path / "kept.txt", tmp_path / "run" / rundir.LOCK
    kept.write_text("precious")
    lock.parent.mkdir()
    NO_LOCKS[kind](lock, kept)
    with (
        pytest.raises(UserError, match=r"/\.lock is a link or not an ordinary file.*delete it"),
        rundir.locked(lock.parent),
    ):
        pass
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.is_file()] == [("kept.txt", "precious")]
    lock.rmdir() if kind == "folder" else lock.unlink()
    for _ in range(2):  # an own lock is opened again, and a linked folder is no linked lock
        with rundir.locked(lock.parent):
            assert "process" in lock.read_text()
    (tmp_path / "linked").symlink_to(lock.parent)
    with rundir.locked(tmp_path / "linked"):
        assert "process" in lock.read_text()


def test_what_a_killed_writer_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stages/01-sft/export.tmp-write").mkdir(parents=True)
    for name in (
        ".resolved.toml.abc.tmp-write",
        "stages/01-sft/export.tmp-write/x",
        "cells/a/run/.x.tmp-write",
        "kept",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    with rundir.locked(run, apart="run"):
        assert [str(p.relative_to(run)) for p in files(run)] == [".lock", "cells/a/run/.x.tmp-write", "kept"]
    with rundir.locked(run):
        assert [str(p.relative_to(run)) for p in files(run)] == [".lock", "kept"]


@pytest.mark.parametrize("words", [["report", "run"], ["eval", "export", "run", "--out", "out"]])
def test_a_writer_removes_what_a_killed_one_left(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    shutil.copytree(whole, run := tmp_path / "run")
    left = (
        run / ".report.html.abc.tmp-write"
        if len(words) == 2
        else tmp_path / "out/rl/.results.json.a.tmp-write"
    )
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("half")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["truestep", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert not left.exists()


def test_a_run_killed_before_its_first_file_can_be_started_again(tmp_path: Path) -> None:
    with rundir.locked(tmp_path):
        pass
    (tmp_path / ".resolved.toml.abc.tmp-write").write_text("half")
    assert not rundir.holds_run(tmp_path, resume=False)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a truestep run directory"):
        rundir.holds_run(tmp_path, resume=False)


# -------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("command", ["report", "run"])
def test_a_full_disk_is_exit_code_5_and_one_line(
    recipe: Path, whole: Path, tmp_path: Path, capsys: Any, command: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    words = ["report", folder] if command == "report" else ["run", recipe, "--out", folder, "--resume"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # every write of a file fails
    try:
        assert "no space left" in assert_one_line(capsys, Path("space"), *words, code=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_stdout_on_a_full_disk_is_exit_code_5_and_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "truestep", "eval", "list"], stdout=full, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE}, check=False,
        )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr.strip().splitlines()[-1].startswith("error: no space left on the disk")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


# ---------------------------------------------------------------------------------------- old reports


def test_results_of_another_version_are_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "results.json").write_text('{"arms": [{"name": "sft", "seeds": [1]}], "benchmarks": ["x"]}')
    assert "KeyError" in assert_one_line(capsys, tmp_path, "report", tmp_path)


def test_settings_that_were_damaged_are_not_shown(whole: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run/resolved.toml"
    path.write_text(path.read_text().replace("steps = 14", "steps = 15"))
    assert "restore it, or pass --out" in assert_one_line(capsys, path, "report", tmp_path / "run")


# ------------------------------------------------------------------------------ errors of the system


def in_place_of(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if kind == "folder" else path.symlink_to(path)


@pytest.mark.parametrize(
    ("commands", "name", "kind"),
    [
        ("report run", "report.html", "folder"), ("report run", "summary.json", "folder"),
        ("report run", "stages/01-sft/metrics.jsonl", "folder"),
        ("report run", "stages/02-rl/rollouts.jsonl", "circle"),
        ("report run", "evaluations/rl/test.samples.jsonl", "folder"), ("run", "evaluations/rl", "circle"),
        ("report run", "resolved.toml", "folder"), ("report run", "provenance.json", "folder"),
    ],
)  # fmt: skip
def test_what_is_no_file_is_one_line(
    recipe: Path, whole: Path, tmp_path: Path, capsys: Any, commands: str, name: str, kind: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / name).exists() or (folder / name).touch()
    in_place_of(folder / name, kind)
    for command in commands.split():
        words = ["report", folder] if command == "report" else ["run", recipe, "--out", folder, "--resume"]
        assert_one_line(capsys, folder, *words)


@pytest.mark.parametrize(
    "words", [("run", "RECIPE", "--out", "OUT"), ("report", "OUT"), ("eval", "export", "OUT", "--out", "x")]
)
def test_a_name_that_is_too_long_is_one_line(recipe: Path, tmp_path: Path, capsys: Any, words: Any) -> None:
    given = {"RECIPE": recipe, "OUT": tmp_path / ("x" * 300)}
    assert_one_line(capsys, tmp_path, *(given.get(word, word) for word in words))


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read and write everything")
@pytest.mark.parametrize("name", ["stages/01-sft", "stages/01-sft/metrics.jsonl", "evaluations/rl", "."])
def test_what_may_not_be_read_is_one_line(whole: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / name).chmod(0o555 if name == "." else 0)
    try:
        assert_one_line(capsys, folder, "report", folder)
    finally:
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/a/.b.x.tmp-write"), "/a: Read-only file system"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a/.b.tmp-write", None, "/a/b"), "/a/b: Is a directory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ConnectionResetError("the server hung up"), "the server hung up"),
        (TimeoutError(), "TimeoutError"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_names_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: OSError, words: str
) -> None:
    def fails() -> Any:
        raise error

    monkeypatch.setattr(cli, "_app", fails)
    assert assert_one_line(capsys, Path("check the path"), "report").startswith(f"error: {words}; check")


def test_a_repaired_folder_gives_the_same_run(
    made: Prepared, half: Path, whole: Path, tmp_path: Path
) -> None:
    """What a resume does not need is made again: summary, provenance, settings, results."""
    shutil.copytree(half, tmp_path / "run")
    draw = random.Random(2)
    for path in [
        *tmp_path.glob("run/evaluations/*/*"),
        *(tmp_path / "run" / n for n in ("summary.json", "provenance.json")),
    ]:
        flip(path, draw)
    go(made, tmp_path / "run", resume=True)
    assert differing(fingerprint(tmp_path / "run"), fingerprint(whole)) == []
