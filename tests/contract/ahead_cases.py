"""A tiny RL stage with ``rollout_ahead``, and engines that sample beside the training."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_runs import Silent, prepared, write_recipe
from torch import Tensor

from truestep.flops import Ledger
from truestep.grade.score import Grader
from truestep.pipeline.models import Session
from truestep.pipeline.prepare import Prepared
from truestep.pipeline.stages import make_stage
from truestep.records import Rollout
from truestep.rollout.engine import Receipt, SampleRequest, SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.train.loop import StageSpec
from truestep.train.parallel import Ranks
from truestep.train.source import RolloutSource

# A coin flip is the reward, so that groups are mixed from the first step on; 8 tokens are enough to be judged.
STAGE = """
name = "tiny"
[model]
path = "tiny"
tiny = { hidden_size = 32, num_layers = 1, num_heads = 2, intermediate_size = 64 }
[compute]
threads = 1
[data.train]
source = "train.jsonl"
[[stages]]
kind = "rl"
data = "train"
steps = 5
prompts_per_step = 4
samples_per_prompt = 4
tokens_per_microbatch = 60
save_every = 2
reward = "random"
rollout_ahead = 1
method = "grpo_token_mean"
method_options = { correction = "truncate" }
optimizer = { lr = 2e-2 }
sampling = { max_new_tokens = 8, max_running = 6 }
"""


def write(folder: Path) -> Path:
    path = write_recipe(folder)
    path.write_text(STAGE)
    return path


@contextmanager
def opened(made: Prepared, folder: Path) -> Iterator[StageSpec]:
    """The stage of a recipe, as a run makes it."""
    with Grader() as grader, ExitStack() as stack:
        session = Session(prepared=made, folder=folder, grader=grader, ranks=Ranks(), reporter=Silent())
        yield make_stage(session, 0, made.settings.model.path, Ledger(), 0, stack)


class Elsewhere(TorchEngine):
    """An engine with its own copy of the weights, as one in other processes has. ``before`` is called in the
    thread that samples, before each rollout of a step (not of a comparison)."""

    runs_beside_training, has_adapters = True, True

    def __init__(self, like: TorchEngine, before: Callable[[int], None] = lambda step: None) -> None:
        super().__init__(copy.deepcopy(like.model), max_running=like.max_running, packs=like.packs)
        self.before, self.threads = before, set[str]()

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingParameters,
        check_stop: Callable[[], None] = lambda: None,
    ) -> Iterator[Rollout]:
        if requests and requests[0].purpose == "sample":
            self.threads.add(threading.current_thread().name)
            self.before(requests[0].step)
            check_stop()
        yield from super().generate(requests, sampling, check_stop)

    def publish(self, weights: Mapping[str, Tensor], version: int) -> Receipt:
        running = [t.name for t in threading.enumerate() if t.name.startswith("rollout-ahead")]
        assert not running, "new weights while a rollout is running"
        return super().publish({n: w.detach().clone() for n, w in weights.items()}, version)


def with_engine(spec: StageSpec, engine: Any) -> StageSpec:
    assert isinstance(spec.source, RolloutSource)
    spec.source.sampler = replace(spec.source.sampler, engine=engine)
    return replace(spec, engine=engine)


def made(folder: Path, *overrides: str) -> Prepared:
    return prepared(write(folder), *overrides)
