"""A cache that others could change is refused: its models are loaded and its environments are run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from truestep import rundir
from truestep.audit.environments import virtual
from truestep.errors import UserError
from truestep.evaluate import benchmarks
from truestep.model.load import resolve
from truestep.model.packaged import packaged_file
from truestep.settings import ModelSettings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    for part in ("", "models", "audit"):
        (folder / part).mkdir()
        (folder / part).chmod(0o755)
    monkeypatch.setenv("TRUESTEP_CACHE", str(folder))
    return folder


def give_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def test_every_user_of_the_cache_refuses_it(cache: Path) -> None:
    cache.chmod(0o1777)
    uses = (
        rundir.cache_folder,
        lambda: virtual.build("trl==1.16.0"),
        lambda: packaged_file("smollm2-135m-instruct"),
        lambda: resolve(ModelSettings(path="smollm2-135m-instruct")),
        benchmarks._record,
    )
    for use in uses:
        with pytest.raises(UserError, match=r"every user can write to the cache .*TRUESTEP_CACHE"):
            use()


@pytest.mark.parametrize("part", ["", "models", "audit"])
def test_a_folder_of_another_user_is_refused(part: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(cache / part, monkeypatch)
    with pytest.raises(UserError, match=r"belongs to another user \(uid \d+\); set TRUESTEP_CACHE"):
        rundir.cache_folder(part)


@pytest.mark.parametrize("part", ["models", "audit"])
def test_a_part_that_everyone_can_write_to_is_refused(part: str, cache: Path) -> None:
    (cache / part).chmod(0o757)
    with pytest.raises(UserError, match=f"write to the cache .*{part}"):
        rundir.cache_folder(part)
    assert rundir.cache_folder() == cache


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o770])
def test_a_folder_of_ones_own_is_used(mode: int, cache: Path) -> None:
    cache.chmod(mode)
    assert rundir.cache_folder("models") == cache / "models"


def test_a_folder_that_does_not_exist_yet_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUESTEP_CACHE", str(tmp_path / "new"))
    assert rundir.cache_folder("models") == tmp_path / "new" / "models"


def test_a_folder_of_root_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder of root")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert rundir.cache_folder("models") == cache / "models"


def test_a_lone_surrogate_is_written_and_read_back(tmp_path: Path) -> None:
    rows = [{"text": "a\ud800b\udc00", "é": "\U0001f600"}]
    rundir.append_jsonl(tmp_path / "rows.jsonl", rows)
    rundir.write_json(tmp_path / "rows.json", rows)
    assert rundir.read_jsonl(tmp_path / "rows.jsonl") == rundir.read_json(tmp_path / "rows.json") == rows
