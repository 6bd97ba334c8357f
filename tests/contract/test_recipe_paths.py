"""Paths in a recipe: relative to the recipe's folder, else to the current one; names and hub ids are left
alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import write_recipe

from truestep.pipeline.history import as_named, read_history
from truestep.pipeline.models import stage_identity
from truestep.pipeline.prepare import prepare
from truestep.pipeline.run import open_run_folder
from truestep.settings import load_settings

RECIPE = """
name = "x"
[model]
path = "{path}"
[data.train]
source = "procedural:addition"
[[stages]]
kind = "sft"
data = "train"
steps = 1
sequences_per_step = 1
tokens_per_microbatch = 64
optimizer = {{ lr = 1e-3 }}
"""


@pytest.mark.parametrize(
    ("path", "made", "expected"),
    [
        ("models/a", "recipes/models/a", "{recipes}/models/a"),
        ("../models/a", "models/a", "{recipes}/../models/a"),
        ("models/a", "models/a", "models/a"),  # beside the current folder only
        ("a.gguf", "recipes/a.gguf", "{recipes}/a.gguf"),
        ("tiny", "recipes/tiny", "tiny"),
        ("org/name", "elsewhere", "org/name"),
    ],
)
def test_a_model_path_is_looked_up_as_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, made: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / made).mkdir(parents=True)
    recipe = tmp_path / "recipes" / "x.toml"
    recipe.write_text(RECIPE.format(path=path))
    assert load_settings(recipe).model.path == expected.format(recipes=tmp_path / "recipes")


OWN_CODE = """
from truestep.objective.methods import METHODS

def always(samples):
    return [1.0] * len(samples)

def mine(**options):
    return METHODS["grpo"](**options)
"""


def test_resolved_settings_can_be_run_again_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data file and own code in the recipe's folder, a data file and a model in the current one."""
    from truestep.checkpoint.export import export_hf
    from truestep.model.tiny import tiny_model, tiny_tokenizer
    from truestep.settings import TinySettings

    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    recipe = write_recipe(home / "recipes")
    elsewhere.mkdir()
    (home / "recipes/own.py").write_text(OWN_CODE)
    (home / "here.jsonl").write_bytes((home / "recipes/train.jsonl").read_bytes())
    tokens, small = (
        tiny_tokenizer(),
        TinySettings(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16),
    )
    export_hf(
        home / "models/a",
        tiny_model(small, seed=0, vocabulary_size=len(tokens), context_length=64),
        tokens,
        card="",
    )
    monkeypatch.chdir(home)
    words = ("model.path=models/a", "data.more.source=here.jsonl", "stages.sft.data=more")
    own = ("stages.rl.reward=own.py:always", "stages.rl.method=own.py:mine")
    made = prepare(load_settings(Path("recipes/run.toml"), (*words, *own)), base_dir=Path("recipes"))
    open_run_folder(made, home / "run", resume=False, rank=0)
    monkeypatch.chdir(elsewhere)
    assert recipe.is_file()
    again = prepare(load_settings("../home/run/resolved.toml"), base_dir=Path("../home/run"))
    assert (again.content, again.model_content) == (made.content, made.model_content)
    assert [list(c.values()) for c in again.code.values()] == [list(c.values()) for c in made.code.values()]
    assert all(again.code["rl"].values())
    history = read_history(home / "run")
    same = prepare(load_settings("../home/run/resolved.toml"), base_dir=Path("../home/run"), history=history)
    assert [stage_identity(same, i) for i in (0, 1)] == [stage_identity(made, i) for i in (0, 1)]
    open_run_folder(same, home / "run", resume=True, rank=0)
    assert read_history(home / "run") == history  # nothing of it is renamed
    moved = load_settings("../home/run/resolved.toml", ["stages.rl.method=../home/other.py:mine"])
    named = as_named(moved, Path("../home/run"), history)
    assert (named.model.path, named.stages[1].method) == ("models/a", "../home/other.py:mine")


def test_resolved_settings_are_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of data files are not part of a run's identity, so that a run can be continued with them."""
    recipe = write_recipe(tmp_path / "recipes")
    made = prepare(load_settings(recipe), base_dir=recipe.parent)
    open_run_folder(made, tmp_path / "run", resume=False, rank=0)
    again = prepare(load_settings(tmp_path / "run/resolved.toml"), base_dir=tmp_path / "run")
    for index in range(2):
        assert stage_identity(again, index) == stage_identity(made, index)
