"""The sum of the parts, the coin, and what a recipe may say about rewards."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from reward_samples import same_text, sample

from truestep.errors import UserError
from truestep.records import RewardInput, Verdict
from truestep.reward_settings import BUILT_IN, RewardSettings, reward_entries
from truestep.rewards.scorer import RewardScorer, fair_coin, sources
from truestep.signals import Interrupted, deferred


@contextmanager
def opened(folder: Path, *entries: dict[str, Any]) -> Iterator[RewardScorer]:
    parsed = reward_entries("checker", [RewardSettings(**entry) for entry in entries])
    with RewardScorer(parsed, grade=same_text, base=folder, folder=folder / "run") as scorer:
        yield scorer


# ----------------------------------------------------------------------------------------------- parts and sums


def test_the_checker_is_one_zero_or_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as scorer:
        right, wrong, unknown = scorer.score([sample(1), sample(1, "2"), sample(1, "?")])
    assert (right.reward, right.verdict, right.extracted) == (1.0, Verdict.CORRECT, "1")
    assert (wrong.reward, wrong.verdict, wrong.reason) == (0.0, Verdict.INCORRECT, "compared as text")
    assert (unknown.reward, unknown.verdict, unknown.reason) == (
        None,
        Verdict.UNSCORED,
        "checker: compared as text",
    )
    assert not unknown.failed
    assert right.parts == {"checker": 1.0}
    assert unknown.parts == {}


PARTS = """
from truestep.records import Verdict

def words(samples, *, factor=1.0):
    assert all(s.verdict is not None for s in samples)
    return [factor * len(s.completion.split()) for s in samples]

def parts(samples):
    return [{"a": 0.25, "b": 0.5} if s.verdict is Verdict.CORRECT else {"a": 1, "reward": 8} for s in samples]

def sometimes(samples):
    return [None if s.verdict is Verdict.INCORRECT else True for s in samples]

def record(samples):
    s = samples[0]
    return [{"ok": (s.problem.columns == {"level": 7} and s.problem.messages == s.messages
             and s.messages[0].content == "What is 7?" and s.completion == "7" and s.completion_ids == (0,)
             and s.stop.value == "stop" and (s.seed, s.step, s.sample, s.limit) == (5, 0, 0, 20))}]
"""


def test_the_reward_is_the_weighted_sum(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(PARTS)
    entries: list[dict[str, Any]] = [
        {"function": "checker", "weight": 2},
        {"function": "reward.py:words", "weight": 0.5, "options": {"factor": 3}},
        {"function": "reward.py:parts", "weight": -1, "name": "p"},
    ]
    with opened(tmp_path, *entries) as scorer:
        right, wrong = scorer.score([sample(1, "1"), sample(1, "no no")])
    assert right.reward == 2 + 0.5 * 3 - 0.75
    assert right.parts == {"checker": 1.0, "words": 3.0, "p": 0.75, "p/a": 0.25, "p/b": 0.5}
    assert wrong.reward == 0 + 0.5 * 6 - 8, "a key called reward is the value"
    assert wrong.parts["p/reward"] == 8


def test_a_missing_part_leaves_a_sample_unscored_unless_its_weight_is_zero(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(PARTS)
    for weight, expected in ((1.0, None), (0.0, 0.0)):
        with opened(
            tmp_path, {"function": "checker"}, {"function": "reward.py:sometimes", "weight": weight}
        ) as scorer:
            right, wrong = scorer.score([sample(1, "1"), sample(1, "2")])
        assert right.reward == 1 + weight
        assert wrong.reward == expected
        assert ("sometimes: the function returned None" in wrong.reason) == (weight != 0)
        assert wrong.parts == {"checker": 0.0}
        assert not wrong.failed


def test_a_sum_that_overflows_is_unscored(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def big(samples): return [1e308 for _ in samples]\n")
    with opened(tmp_path, {"function": "reward.py:big", "weight": 10}) as scorer:
        (result,) = scorer.score([sample(1)])
    assert result.reward is None
    assert "finite" in result.reason


def test_the_record_arrives_whole(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(PARTS)
    with opened(tmp_path, {"function": "reward.py:record"}) as scorer:
        assert scorer.score([sample(7)])[0].reward == 1.0
        assert scorer.score([]) == []


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "import numpy\nwhole = lambda samples: numpy.array([s.sample / 4 for s in samples], dtype='float32')\n"
        "def each(samples): return (numpy.int64(s.sample) for s in samples)\n"
    )
    (tmp_path / "tensors.py").write_text(
        "import torch\ndef tensor(samples): return torch.tensor([s.sample / 2 for s in samples])\n"
    )
    names = ("reward.py:whole", "reward.py:each", "tensors.py:tensor")
    with opened(tmp_path, *[{"function": name} for name in names]) as scorer:
        results = scorer.score([sample(1, sample=n) for n in range(3)])
    assert [r.reward for r in results] == [0.0, 1.75, 3.5]


def test_batches_keep_the_order(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "import time\ndef score(samples):\n    time.sleep(0.02 * (samples[0].sample % 3))\n"
        "    return [{'reward': s.sample, 'n': len(samples)} for s in samples]\n"
    )
    with opened(tmp_path, {"function": "reward.py:score", "workers": 3, "batch_size": 4}) as scorer:
        results = scorer.score([sample(1, sample=n) for n in range(30)])
    assert [r.reward for r in results] == list(range(30))
    assert max(r.parts["score/n"] for r in results) == 4


def test_an_interrupt_ends_the_wait(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "import os, signal, time\ndef score(samples):\n    os.kill(os.getppid(), signal.SIGINT)\n    time.sleep(600)\n"
    )
    with deferred(), pytest.raises(Interrupted), opened(tmp_path, {"function": "reward.py:score"}) as scorer:
        scorer.score([sample(1)])


# ------------------------------------------------------------------------------------------------------ the coin


def coins(inputs: list[RewardInput]) -> list[float | None]:
    with opened(Path("."), {"function": "random"}) as scorer:
        return [result.reward for result in scorer.score(inputs)]


def test_the_coin_is_fair_and_does_not_read() -> None:
    inputs = [sample(n, sample=k) for n in range(50) for k in range(8)]
    flips = coins(inputs)
    assert set(flips) == {0.0, 1.0}
    assert 160 < sum(flip == 1.0 for flip in flips) < 240  # 400 flips: 4 standard errors are 40
    assert flips == coins([sample(n, "nonsense", sample=k) for n in range(50) for k in range(8)])


def test_the_coin_knows_neither_ranks_nor_the_order_of_a_call() -> None:
    inputs = [sample(n, sample=k, step=3) for n in range(20) for k in range(4)]
    flips = dict(zip(((i.problem.id, i.sample) for i in inputs), coins(inputs), strict=True))
    random.Random(1).shuffle(inputs)
    for cut in (0, 1, 17, 40, 80):  # two ranks, two calls
        parts = inputs[:cut], inputs[cut:]
        again = [flip for part in parts for flip in coins(part)]
        assert {(i.problem.id, i.sample): f for i, f in zip(inputs, again, strict=True)} == flips


def test_each_coordinate_of_the_identity_changes_the_coin() -> None:
    def flips(**changed: Any) -> list[float]:
        return [fair_coin(sample(n, **changed)) for n in range(64)]

    assert flips() == flips()
    for other in ({"seed": 6}, {"step": 1}, {"sample": 1}):
        assert flips(**other) != flips()
    assert flips() != [fair_coin(sample(n + 64)) for n in range(64)]


# ------------------------------------------------------------------------------------- what a recipe may say


@pytest.mark.parametrize(("entry", "words"), [
    ({"function": "cheker"}, 'did you mean "checker"?'),
    ({"function": "reward.py"}, "FILE.py:FUNCTION"),
    ({"function": "reward.py:a.b"}, "FILE.py:FUNCTION"),
    ({"function": "my reward:f"}, "is not a reward"),
    ({"function": "checker", "options": {"a": 1}}, "takes no options"),
    ({"function": "checker", "name": "a/b"}, "letters"),
    ({"function": "checker", "weight": float("nan")}, "finite"),
    ({"function": "format", "max_failure_share": 1.5}, "less than or equal to 1"),
    ({"function": "judge", "options": {"key_env": "sk-abcdefgh12345678"}}, r"options\.key_env looks like a secret.*\$\{NAME\}"),
    ({"function": "format", "time": 3}, "Extra inputs"),
])  # fmt: skip
def test_settings_that_are_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words.replace("?", r"\?")):
        RewardSettings(**entry)


def test_names_and_defaults() -> None:
    assert RewardSettings(function="reward.py:score").name == "score"
    assert RewardSettings(function="a.b:c").name == "c"
    assert RewardSettings(function="a/b c.py:d").name == "d"
    assert (
        RewardSettings(function="judge").timeout_seconds > RewardSettings(function="format").timeout_seconds
    )
    assert RewardSettings(function="judge", timeout_seconds=3).timeout_seconds == 3
    (only,) = reward_entries("random", [])
    assert (only.function, only.weight, only.name) == ("random", 1.0, "random")
    entry = RewardSettings(function="reward.py:score")
    assert reward_entries("checker", [entry]) == (entry,)
    with pytest.raises(ValueError, match='two rewards are called "score"'):
        reward_entries("checker", [entry, RewardSettings(function="other.py:score")])
    with pytest.raises(ValueError, match='needs the reward "checker"'):
        reward_entries("length", [])


FILES = {
    "fine.py": "from helper import one\ndef score(samples): return [one for _ in samples]\nlimit = 3\n",
    "helper.py": "one = 1\n",
    "random.py": "raise RuntimeError('the standard library is hidden')\n",
    "broken.py": "x = 1\ndef score(samples)\n    pass\n",
    "raises.py": "import math\n\ndef f():\n    return missing\n\nf()\n",
    "leaves.py": "import sys\nsys.exit(0)\n",
    "dies.py": "import os\nprint('last words')\nos._exit(7)\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "rewardpackage").mkdir()
    (tmp_path / "rewardpackage" / "__init__.py").write_text("")
    (tmp_path / "rewardpackage" / "inner.py").write_text("from .sibling import score\n")
    (tmp_path / "rewardpackage" / "sibling.py").write_text(
        "def score(samples): return [2 for _ in samples]\n"
    )
    return tmp_path


@pytest.mark.parametrize("function", ["fine.py:score", "./fine.py:score", "rewardpackage.inner:score"])
def test_a_function_is_found(folder: Path, function: str) -> None:
    with opened(folder, {"function": function}) as scorer:
        assert scorer.score([sample(1)])[0].reward in (1.0, 2.0)


@pytest.mark.parametrize(("function", "words"), [
    ("fien.py:score", 'fien.py does not exist; did you mean "fine.py"?'),
    ("fine.py:scor", 'scor does not exist in .*fine.py; did you mean "score"?'),
    ("fine.py:limit", "limit is not a function in .*fine.py"),
    ("broken.py:score", r"SyntaxError: expected ':' \(.*broken.py, line 2\)"),
    ("raises.py:score", r"NameError: name 'missing' is not defined \(.*raises.py, line 4, in f\)"),
    ("leaves.py:score", "SystemExit: 0"),
    ("dies.py:score", "exit status 7\nThe function printed:\nlast words"),
    ("nowhere.at_all:score", "module nowhere does not exist"),
    ("rewardpackage.outer:score", "module rewardpackage.outer does not exist"),
])  # fmt: skip
def test_a_function_that_cannot_be_had_is_one_clear_error(folder: Path, function: str, words: str) -> None:
    with (
        pytest.raises(UserError, match=words.replace("?", r"\?")) as caught,
        opened(folder, {"function": function}),
    ):
        pass
    assert str(caught.value).startswith(f'reward "{function.rpartition(":")[2]}" cannot') or function in str(
        caught.value
    )
    assert "truestep/rewards" not in str(caught.value)


@pytest.mark.parametrize(("entry", "words"), [
    ({"function": "fine.py:score", "options": {"factor": 2}}, "unexpected keyword argument 'factor'"),
    ({"function": "format", "options": {"patern": "x"}}, 'did you mean "pattern"?'),
    ({"function": "format", "options": {"pattern": "("}}, "not a regular expression"),
    ({"function": "overlong", "options": {"fraction": 0}}, "options.fraction"),
    ({"function": "judge", "options": {"url": "localhost", "model": "m"}}, "options: url"),
    ({"function": "judge", "options": {"url": "http://x", "model": "m", "scael": 1}}, 'did you mean "scale"?'),
    ({"function": "judge", "options": {"url": "http://x", "model": "m", "key_env": "NOT_SET"}}, "NOT_SET is not set"),
])  # fmt: skip
def test_options_are_checked_before_anything_is_sampled(
    folder: Path, entry: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("?", r"\?")), opened(folder, entry):
        pass


def test_the_hash_is_of_the_users_file(folder: Path) -> None:
    entries = [RewardSettings(function=f) for f in ("fine.py:score", "format", "random", "checker")]
    found = sources(entries, folder)
    assert set(found) == {"score", "format"}
    assert found["score"].sha256 == hashlib.sha256(FILES["fine.py"].encode()).hexdigest()
    assert found["format"].sha256 == ""
    inner = sources([RewardSettings(function="rewardpackage.inner:score")], folder)["score"]
    assert inner.path == str(folder / "rewardpackage" / "inner.py")
    assert inner.sha256 == hashlib.sha256(b"from .sibling import score\n").hexdigest()


def test_a_file_that_changes_under_a_run_stops_it(folder: Path) -> None:
    scorer = RewardScorer(
        [RewardSettings(function="fine.py:score")], grade=same_text, base=folder, folder=folder
    )
    (folder / "fine.py").write_text("def score(samples): return [3 for _ in samples]\n")
    with pytest.raises(UserError, match="has changed since the run was started"), scorer:
        pass


def test_all_built_in_rewards_can_be_named() -> None:
    assert [RewardSettings(function=name).name for name in BUILT_IN] == list(BUILT_IN)
