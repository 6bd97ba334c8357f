"""Makes a run's policies and sampling engines, and the hashes of everything that a result depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from truestep import signals
from truestep.data.chat import completion_text
from truestep.device import compute_device, matmul_rate
from truestep.grade.score import Grader
from truestep.model.forward import decoder_layers
from truestep.model.load import LoadedModel, load_model, model_shape
from truestep.model.lora import choose_trained
from truestep.pipeline.history import MEASURES, Change, begun_with
from truestep.pipeline.prepare import Prepared
from truestep.pipeline.track import Trackers
from truestep.progress import Reporter
from truestep.records import Prompt
from truestep.rollout.engine_torch import TorchEngine
from truestep.settings import (
    OUTSIDE_COMPUTE,
    OUTSIDE_RESULTS,
    ChatSettings,
    RejectionSettings,
    RlSettings,
    StageSettings,
    settings_hash,
)
from truestep.train.checkpoints import Earlier
from truestep.train.parallel import Ranks, build, replicate
from truestep.train.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Session:
    """The state that all stages of a run share."""

    prepared: Prepared
    folder: Path
    grader: Grader
    ranks: Ranks
    reporter: Reporter
    trackers: Trackers = field(default_factory=Trackers)
    is_strict: bool = False  # a warning ends the run
    warned: list[dict[str, Any]] = field(default_factory=list)  # why stages are worthless, as Watch says it
    evaluated: list[str] = field(
        default_factory=list
    )  # checkpoints whose evaluations this process has checked

    @property
    def check_stop(self) -> Callable[[], None]:
        """The check for a signal during work without collectives, which several ranks do ``Ranks.apart``."""
        return signals.check

    def decode(self, ids: Sequence[int]) -> str:
        return completion_text(self.prepared.tokenizer, ids, self.prepared.settings.chat.special_tokens)

    def decode_prompt(self, prompt: Prompt) -> str:
        return str(self.prepared.tokenizer.decode(list(prompt.token_ids)))


def open_model(session: Session, path: str, *, empty: bool = False) -> LoadedModel:
    """Load the model in a folder (or the base model) in the run's dtype, or only find its weights if ``empty``."""
    settings = session.prepared.settings
    model, dtype = settings.model.model_copy(update={"path": path}), getattr(torch, settings.compute.dtype)
    return load_model(model, dtype=dtype, device=compute_device(), seed=settings.seed, empty=empty)


def is_split(session: Session) -> bool:
    """Return whether each rank has only a shard of a policy."""
    return session.ranks.world_size > 1 and session.prepared.settings.compute.parallel == "fsdp2"


def make_policy(session: Session, path: str, stage: StageSettings | None = None) -> Policy:
    """Make a policy from a folder, sharded or replicated over the ranks, in which what the stage trains has gradients
    (if there is no stage, nothing). A rank reads only its shard."""
    compute, sharded = session.prepared.settings.compute, is_split(session)
    loaded = open_model(session, path, empty=sharded)
    if stage is None:
        loaded.model.requires_grad_(False)
    else:
        choose_trained(loaded.model, stage, session.prepared.settings.seed)
    loaded = replace(loaded, shape=model_shape(loaded.model))
    policy = Policy(
        loaded, gradient_checkpointing=compute.gradient_checkpointing, compile=compute.compile,
        offload_activations=compute.offload_activations,
    )  # fmt: skip
    if loaded.weights is not None:
        build(policy, decoder_layers(policy.model), loaded.weights, session.ranks)
    else:
        replicate(policy, session.ranks)
    for note in policy.notes:
        session.reporter.say(note)
    if compute.dtype == "bfloat16":  # slow on processors without AMX or AVX-512
        rate, plain = matmul_rate(torch.bfloat16), matmul_rate(torch.float32)
        if rate <= plain:
            session.reporter.say(
                f"bfloat16 takes {plain / rate:.1f} times as long as float32 on this processor "
                f'({rate / 1e9:.1f} against {plain / 1e9:.1f} GFLOP/s); set compute.dtype = "float32"'
            )
    return policy


def make_engine(
    session: Session, policy: Policy | None, path: str, max_running: int, stage: StageSettings | None = None
) -> TorchEngine:
    """Make an engine on the policy's module, or on a separate model if ``policy`` is None or sharded."""
    if policy is None or is_split(session):
        loaded = open_model(session, path)
        if stage is not None:  # with the same adapters, which are then published like all weights
            choose_trained(loaded.model, stage, session.prepared.settings.seed)
        policy = Policy(loaded)
    return TorchEngine(policy.model, max_running=max_running, packs=policy.packs and policy.plain_head)


def stage_identity(prepared: Prepared, index: int) -> str:
    """Return the hash of the settings, code, data and changes of a stage and of every stage before it."""
    return _identity(prepared, index, prepared.history.changes)


def earlier_identities(prepared: Prepared, index: int) -> dict[str, Earlier]:
    """Return the identities that the stage had before its last changes, at the step of these changes."""
    changes, found = list(prepared.history.changes), {}
    own = prepared.history.of(prepared.settings.stages[index].name)
    is_same = True
    for change in reversed(own):
        if change.step != own[-1].step:
            break
        del changes[changes.index(change) :]
        is_same &= not any(fnmatchcase(key, pattern) for key in change.values for pattern in MEASURES)
        found[_identity(prepared, index, changes)] = Earlier(step=change.step, keeps_best=is_same)
    return found


def _identity(prepared: Prepared, index: int, changes: Sequence[Change]) -> str:
    settings = begun_with(prepared.named, prepared.history)
    parts: list[Any] = [base_identity(prepared), _chat(prepared)]
    for stage in settings.stages[: index + 1]:
        ignored: dict[str, Any] = {**OUTSIDE_RESULTS}
        if isinstance(stage, RlSettings | RejectionSettings):
            ignored["sampling"] = stage.sampling.model_copy(update={"max_running": 1})
        if code := prepared.code[stage.name]:
            parts.append(str(sorted(code.items())))
        frozen, dev, held = stage.model_copy(update=ignored), stage.dev.data, stage.validation.data
        parts += [
            frozen,
            *(prepared.content[name] for name in stage.data_names),
            prepared.content.get(dev, ""),
        ]
        parts += [prepared.content[held]] if held else []
        parts += [settings.evaluate.data_sampling.model_copy(update={"max_running": 1})] if dev else []
        for change in (c for c in changes if c.stage == stage.name):
            parts.append(
                {"step": change.step, "changed": {key: pair[1] for key, pair in change.values.items()}}
            )
    return settings_hash(*parts)


def _chat(prepared: Prepared) -> ChatSettings:
    """Return the chat settings as they are part of an identity."""
    chat = prepared.settings.chat
    return chat.model_copy(update={"template": "model"}) if prepared.is_plain else chat


def evaluation_identity(prepared: Prepared, model_identity: str, name: str) -> str:
    """Return the hash of everything that an evaluation on the data set ``name`` depends on."""
    settings = prepared.settings
    sampling = settings.evaluate.data_sampling.model_copy(update={"max_running": 1})
    sampled = (sampling, settings.evaluate.data_samples, _chat(prepared), settings.seed)
    return settings_hash(*sampled, model_identity, prepared.content[name])


def base_identity(prepared: Prepared) -> str:
    """Return the hash of the base model: its settings, the content of its files, and its dtype. How the model is
    spread over ranks and memory changes only rounding."""
    settings = prepared.named
    compute = settings.compute.model_copy(update=OUTSIDE_COMPUTE)
    return settings_hash(settings.model, prepared.model_content, compute, settings.seed)
