"""The settings of a run, as frozen pydantic models that are read from one TOML file. Unknown keys, duplicate
keys and contradictions are errors with a remedy. ``resolved.toml`` in the run directory has every setting.

A batch size is named after what it counts. Batch sizes that are not settings are derived from those that are.
One file: the models refer to each other."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, model_validator

from truestep.data_settings import OVERLONG_SHARE, Checker, DataShare, OneOrSeveral
from truestep.data_settings import DataSettings as DataSettings
from truestep.errors import UserError, did_you_mean, one_line
from truestep.frozen import Frozen
from truestep.http_client import LOOPBACK
from truestep.redaction import INSTEAD, find_secret
from truestep.reward_settings import RewardSettings, reward_entries
from truestep.stage_settings import DevSettings as DevSettings
from truestep.stage_settings import EarlyStoppingSettings, ValidationSettings
from truestep.stage_settings import OptimizerSettings as OptimizerSettings

M = TypeVar("M", bound=Frozen)
Positive = Annotated[int, Field(ge=1)]
Pinned = Literal["benchmark"]  # the value in the table of benchmarks


class TinySettings(Frozen):
    """The built-in model, a newly initialized Llama of about 1 M parameters with a character tokenizer."""

    hidden_size: int = Field(128, ge=8, multiple_of=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(384, ge=8)

    @model_validator(mode="after")
    def _heads(self) -> Self:
        size, even = self.hidden_size, 2 * self.num_heads
        if size % even:
            raise ValueError(f"hidden_size = {size} is not a multiple of {even} (2 x num_heads)")
        return self


class ModelSettings(Frozen):
    path: str  # tiny | smollm2-135m-instruct | folder | file.gguf | hub id
    context_length: Annotated[int, Field(ge=8)] | Literal["model"] = "model"
    rope_theta: Annotated[float, Field(gt=0)] | Literal["model"] = "model"
    # How RoPE reaches a context_length beyond the model's own; none: the rotations are left as they are.
    rope_scaling: Literal["model", "none", "linear", "yarn"] = "model"
    tiny: TinySettings = TinySettings()


class ComputeSettings(Frozen):
    # Results are bit-exact only for a fixed number. auto: all cores that this process may use.
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    gradient_checkpointing: bool | Literal["selective"] = False  # selective keeps the matrix products
    compile: bool = False


PINNED_DATE = "2024-07-26"


class ChatSettings(Frozen):
    """The format in which a problem becomes a prompt. It is the same in SFT, RL and evaluation."""

    system: str = ""
    user: str = "{problem}"
    generation_suffix: str = ""  # e.g. "<think>\n": ends the prompt; removed from a demonstration's start
    # Special tokens that texts may contain, and that stay in completions, e.g. ["<think>", "</think>"].
    special_tokens: tuple[str, ...] = ()
    template: Literal["model", "plain", "alpaca", "user-assistant", "chatml", "llama3"] = "model"
    date: str = PINNED_DATE  # the date that a chat template may write; today's would change every day

    @model_validator(mode="after")
    def _is_date(self) -> Self:
        if not re.fullmatch(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])", self.date):
            raise ValueError("date must be written as YYYY-MM-DD")
        return self

    @model_validator(mode="after")
    def _has_problem(self) -> Self:
        if self.user.count("{problem}") != 1:
            raise ValueError('chat.user must contain "{problem}" exactly once')
        return self


class FaultSettings(Frozen):
    """Known faults of other frameworks, which an arm of a study can inject as wrong micro-batch weights. With
    any fault, a micro-batch contains ``sequences_per_microbatch`` sequences, in data order."""

    # first_last: as measured; first_only: as described in the paper's text
    offload_drop: Literal["none", "first_last", "first_only"] = "none"
    micro_mean: bool = False  # mean of micro-batch means
    dp_token_mean: bool = False  # tokens counted over ranks, but per micro-step (the paper's algorithm 2)
    others: tuple[str, ...] = ()  # further names from faults.FAULTS
    sequences_per_microbatch: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_mean(self) -> Self:
        if self.micro_mean and self.dp_token_mean:
            both = "micro_mean and dp_token_mean"
            raise ValueError(f"{both} are two versions of the same mean; set only one of them")
        return self


class StageSettings(Frozen):
    kind: str
    name: str = ""
    data: OneOrSeveral[DataShare]
    tokens_per_microbatch: int = Field(ge=1)  # memory only; never changes the update
    optimizer: OptimizerSettings
    freeze: tuple[
        str, ...
    ] = ()  # patterns of parameters that are not trained, such as "model.layers.[0-3].*"
    save_every: int = Field(50, ge=1)  # steps
    save_every_minutes: float = Field(0, ge=0)  # also save if the last checkpoint is older; 0: only by steps
    keep_checkpoints: int = Field(2, ge=1)
    dev: DevSettings = DevSettings()
    validation: ValidationSettings = ValidationSettings()
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    faults: FaultSettings = FaultSettings()

    @property
    def shares(self) -> tuple[DataShare, ...]:
        """The data sets of the stage, of which most have one."""
        return (DataShare(name=self.data),) if isinstance(self.data, str) else self.data

    @property
    def data_names(self) -> tuple[str, ...]:
        return tuple(share.name for share in self.shares)

    @model_validator(mode="after")
    def _sets_once(self) -> Self:
        names = self.data_names
        if not isinstance(self.data, str) and len(names) < 2:
            raise ValueError('data is a list of one; set data = "NAME"')
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f'data has "{twice}" twice; add the weights')
        return self

    @property
    def watched_data(self) -> dict[str, str]:
        """The data sets on which the stage is measured while it trains, by the table that names them."""
        named = {"dev": self.dev.data, "validation": self.validation.data}
        return {key: data for key, data in named.items() if data}

    @model_validator(mode="after")
    def _watched(self) -> Self:
        if self.dev.select_best and self.validation.select_best:
            raise ValueError("dev.select_best and validation.select_best exclude each other; set only one")
        on = "validation" if self.early_stopping.watch == "validation/loss" else "dev"
        if self.early_stopping.patience and not getattr(self, on).data:
            raise ValueError(
                f"early_stopping.patience needs {on}.data and {on}.every_steps, or a different early_stopping.watch"
            )
        return self


# Keys of a stage, and of [compute], that affect only memory, speed, files and rounding. They are not part of its
# identity and may change on resuming.
OUTSIDE_RESULTS = {
    "save_every": 1,
    "save_every_minutes": 0,
    "keep_checkpoints": 1,
    "tokens_per_microbatch": 1,
}
OUTSIDE_COMPUTE = {"threads": 1, "parallel": "auto", "gradient_checkpointing": False, "compile": False}


def _has_one_length(stage: Any) -> Any:
    if (stage.epochs > 0) == (stage.steps > 0):
        raise ValueError("exactly one of epochs and steps must be greater than 0")
    named = getattr(stage, "epochs_of", "")
    if len(stage.shares) > 1 and stage.epochs and named not in stage.data_names:
        known = ", ".join(stage.data_names)
        raise ValueError(f"epochs of which data set? Set epochs_of to one of {known}, or set steps")
    if named and (len(stage.shares) == 1 or not stage.epochs):
        raise ValueError("epochs_of is for epochs of one of several data sets; remove it")
    return stage


class SftSettings(StageSettings):
    kind: Literal["sft"]
    sequences_per_step: int = Field(ge=1)
    epochs: float = Field(0, ge=0)
    epochs_of: str = ""  # with several data sets, the one whose epochs are meant
    steps: int = Field(0, ge=0)
    method: str = "sft"
    method_options: dict[str, float | str | bool] = Field(default_factory=dict)

    _one_length = model_validator(mode="after")(_has_one_length)


class SamplingSettings(Frozen):
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(ge=1)
    max_running: int = Field(64, ge=1)  # rows decoded at once: memory only


class RejectionSettings(StageSettings):
    """A stage that samples from its initial model and does SFT on the samples that the checker accepts."""

    kind: Literal["rejection"]
    data: str
    sampling: SamplingSettings
    samples_per_prompt: int = Field(8, ge=1)
    keep_per_prompt: int = Field(4, ge=1)
    sequences_per_step: int = Field(ge=1)
    epochs: float = Field(0, ge=0)
    steps: int = Field(0, ge=0)

    _one_length = model_validator(mode="after")(_has_one_length)


class RlSettings(StageSettings):
    kind: Literal["rl"]
    steps: int = Field(ge=1)
    prompts_per_step: int = Field(ge=1)  # prompts of one rollout batch
    samples_per_prompt: int = Field(8, ge=2)
    updates_per_rollout: int = Field(2, ge=1)  # the batch is split by prompt into this many mini-batches
    # 1: the groups of a step are sampled while the step before it trains, by weights that are one step older
    rollout_ahead: Literal[0, 1] = 0
    sampling: SamplingSettings
    engine: Literal["torch", "vllm"] = "torch"  # vllm: see [vllm]
    reward: str = "checker"  # checker, random (a control: a coin flip per sample) or a reward function
    rewards: tuple[RewardSettings, ...] = ()  # several rewards, with weights
    solved_at: float = 1.0  # without a checker, a sample with at least this reward solves its problem
    method: str = "grpo_token_mean"
    method_options: dict[str, float | str | bool] = Field(default_factory=dict)

    @property
    def reward_entries(self) -> tuple[RewardSettings, ...]:
        """The rewards in force."""
        return reward_entries(self.reward, self.rewards)

    @model_validator(mode="after")
    def _arithmetic(self) -> Self:
        _ = self.reward_entries  # raises for a reward that does not exist
        p, u = self.prompts_per_step, self.updates_per_rollout
        if p % u:
            raise ValueError(
                f"prompts_per_step = {p} cannot be split into updates_per_rollout = {u} equal mini-batches "
                f"({p} / {u} = {p / u:g}); set prompts_per_step = {(p // u + 1) * u} or updates_per_rollout = 1"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "rl at temperature 0 makes all samples of a group identical; set temperature = 1.0"
            )
        if self.sampling.top_p < 1 or self.sampling.top_k:
            raise ValueError(
                "with top_p < 1 or top_k > 0, rl samples from a truncated distribution, whose "
                "log-probabilities are not the policy's; set top_p = 1.0 and top_k = 0"
            )
        return self


class VllmSettings(Frozen):
    """vLLM servers for RL stages with engine = "vllm". They change speed and memory, not what is sampled from."""

    attach: tuple[
        str, ...
    ] = ()  # addresses of running servers, http://HOST:PORT; none: truestep starts its own
    servers: int = Field(1, ge=1)  # number of servers to start
    devices: tuple[str, ...] = ()  # GPUs of each server, e.g. ["2,3", "4,5"]; (): all that truestep may use
    options: tuple[str, ...] = ()  # further arguments for vLLM's command line
    transfer: Literal["file", "broadcast"] = "file"  # weights as files, or from memory to memory
    folder: str = ""  # where weights are handed over, readable by the servers; "": shared memory
    sleep: bool = False  # servers give up their memory while the trainer updates (same accelerator)
    restarts: int = Field(3, ge=0)  # of servers that die, in one stage

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.attach and (self.options or self.servers != 1):
            raise ValueError(
                "attach uses servers that run already; remove servers and options, or remove attach"
            )
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(
                f"devices has {len(self.devices)} entries for servers = {self.servers}; write one for each"
            )
        for url in self.attach:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
                raise ValueError(f"attach: {url!r} is not an address; write http://HOST:PORT")
            if parts.hostname not in LOOPBACK and self.transfer == "file" and not self.folder:
                raise ValueError(
                    f"attach: {url} is on another machine; set folder to one that both can read, or transfer = "
                    '"broadcast"'
                )
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    "attach: an address is written to files; it must not contain a user name, a password or a query"
                )
        return self


Stage = Annotated[SftSettings | RlSettings | RejectionSettings, Field(discriminator="kind")]


class EvaluationSampling(Frozen):
    """The sampling of an evaluation. "benchmark" stands for the value pinned in the table of benchmarks."""

    temperature: Annotated[float, Field(ge=0)] | Pinned = "benchmark"
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: Positive | Pinned = "benchmark"
    max_running: int = Field(64, ge=1)  # rows decoded, or requests sent, at once: memory only

    def resolved(self, temperature: float, max_new_tokens: int) -> SamplingSettings:
        """Return the sampling settings, with these values in place of "benchmark"."""
        pinned = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        given = {key: value for key, value in self.model_dump().items() if value != "benchmark"}
        return SamplingSettings.model_validate(pinned | given)


class EvaluateSettings(Frozen):
    """The evaluation of a run's checkpoints on its data sets or, with ``truestep eval``, of any model on
    pinned ``benchmarks``. For these, ``samples_per_problem`` and ``sampling`` default to "benchmark"."""

    data: tuple[str, ...] = ()
    before: bool = True  # also evaluate the base model
    samples_per_problem: Positive | Pinned = 1
    pass_at: tuple[int, ...] = (1,)  # for data sets; a benchmark gets every k
    sampling: EvaluationSampling = EvaluationSampling(temperature=0.6, max_new_tokens=256)
    benchmarks: tuple[str, ...] = ()  # ids, or your own files and folders: PATH or NAME=PATH
    benchmark_checker: Checker | Literal["auto"] = "auto"  # of your own benchmarks, instead of a row's
    scorers: tuple[
        RewardSettings, ...
    ] = ()  # rewards that every sample of a benchmark gets, next to its verdict
    folder: str = ""  # contains ID.jsonl, .parquet or .csv for each benchmark; "": the Hugging Face hub
    engine: str = (
        "torch"  # one of cli/evaluation_actions.py's ENGINES, or the URL of an OpenAI-compatible endpoint
    )
    prompts: tuple[str, ...] = ("benchmark",)
    few_shot: int = Field(0, ge=0, le=8)
    limit: Positive | Literal["all"] = "all"
    limits: dict[str, Positive] = Field(default_factory=dict)  # by benchmark, instead of limit

    @model_validator(mode="before")
    @classmethod
    def _benchmark_defaults(cls, raw: Any) -> Any:
        pinned = {"samples_per_problem": "benchmark", "sampling": {}}
        return pinned | raw if isinstance(raw, dict) and raw.get("benchmarks") else raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        samples, limit = self.samples_per_problem, self.sampling.max_new_tokens
        if self.data and self.benchmarks:
            raise ValueError("data and benchmarks cannot be evaluated together; remove one of them")
        if self.scorers:
            reward_entries("", self.scorers)
            if not self.benchmarks:
                raise ValueError(
                    "scorers: only samples of benchmarks are scored; set benchmarks, or remove scorers"
                )
        for key, value in (("samples_per_problem", samples), ("sampling.max_new_tokens", limit)):
            if value == "benchmark" and not self.benchmarks:
                raise ValueError(f"{key}: expected a whole number, because no benchmarks are given")
        if samples != "benchmark" and not self.benchmarks:
            if bad := [k for k in self.pass_at if not 1 <= k <= samples]:
                raise ValueError(f"pass_at = {bad[0]} needs samples_per_problem >= {bad[0]}, got {samples}")
            if self.sampling.temperature == 0 and samples > 1:
                raise ValueError("temperature 0 makes all samples identical; set samples_per_problem = 1")
        address = urlsplit(self.engine)
        if address.username or address.password or address.query:
            raise ValueError(
                "engine: the URL is written to files and must not contain a user name, a password or a query; "
                "set TRUESTEP_API_KEY, and use only scheme, host, port and path"
            )
        if stray := [id for id in self.limits if id not in self.benchmarks]:
            raise ValueError(
                f"limits.{stray[0]} is set, but {stray[0]} is not in benchmarks; add it, or remove the limit"
            )
        return self

    @property
    def is_endpoint(self) -> bool:
        return self.engine.startswith(("http://", "https://"))

    @property
    def data_sampling(self) -> SamplingSettings:
        """The sampling for the recipe's own data sets."""
        return self.sampling.resolved(temperature=1.0, max_new_tokens=256)  # a number: see _consistent

    @property
    def data_samples(self) -> int:
        return 1 if self.samples_per_problem == "benchmark" else self.samples_per_problem


class Settings(Frozen):
    """The settings of a whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    model: ModelSettings
    compute: ComputeSettings = ComputeSettings()
    chat: ChatSettings = ChatSettings()
    data: dict[str, DataSettings]
    stages: tuple[Stage, ...] = ()
    evaluate: EvaluateSettings = EvaluateSettings()
    vllm: VllmSettings = VllmSettings()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    declared: dict[str, Any] = Field(default_factory=dict)  # for a dry run without weights and data

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, raw: Any) -> Any:
        if (key := find_secret(raw)) is not None:
            raise ValueError(
                f"{key} looks like a secret, and settings are written to files; {INSTEAD}; the hub's token is "
                "HF_TOKEN, and an endpoint's key is TRUESTEP_API_KEY"
            )
        return raw

    @model_validator(mode="before")
    @classmethod
    def _stage_names(cls, raw: Any) -> Any:
        """Give every unnamed stage the name of its kind."""
        listed = raw.get("stages") if isinstance(raw, dict) else None
        if not isinstance(listed, list):
            return raw
        named = [
            {**s, "name": s.get("name") or s.get("kind", "")} if isinstance(s, dict) else s for s in listed
        ]
        return {**raw, "stages": named}

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name in self.data:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                allowed = "use only letters, digits, '.', '_' and '-'"
                raise ValueError(f"data.{name}: the name is used as a file name; {allowed}")
        names = [s.name for s in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'two stages are called "{name}"; set a different name for each')
            if name in ("base", "report") or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f'stage name "{name}" is reserved or contains characters other than letters, digits, '
                    '"-" and "_"; set a different name'
                )
        wanted = [(f"stages.{s.name}.data", name) for s in self.stages for name in s.data_names]
        within = [(f"stages.{s.name}.{k}.data", n) for s in self.stages for k, n in s.watched_data.items()]
        wanted += [*within, *[("evaluate.data", d) for d in self.evaluate.data]]
        trained = [name for stage in self.stages for name in stage.data_names]
        for where, name in within:
            if name in (*self.evaluate.data, *trained):
                raise ValueError(
                    f'{where} = "{name}" is also used for training or testing; choose a different data set'
                )
        for where, name in wanted:
            if name not in self.data:
                known = (", ".join(self.data) or "none") + did_you_mean(name, list(self.data))
                raise ValueError(f'{where} = "{name}" is not a data set; [data.*] has: {known}')
        for s in self.stages:
            if isinstance(s, RlSettings) and s.rollout_ahead and s.engine == "vllm" and self.vllm.sleep:
                raise ValueError(
                    f"vllm.sleep = true: servers that sleep while the trainer updates cannot sample then, as "
                    f"stages.{s.name}.rollout_ahead = {s.rollout_ahead} needs; set one of them to its default"
                )
        if self.compute.parallel == "fsdp2" and self.compute.compile:
            raise ValueError(
                "compute.compile with fsdp2 has not been shown to give the same updates; set compile = false"
            )
        return self


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe and apply ``--set key=value`` overrides (values in TOML syntax; a bare word is a string).
    Raises UserError with one line naming the file, the key and what was expected."""
    settings = parse_settings(read_recipe(path, overrides), where=str(path))
    model = settings.model.path
    beside = Path(path).parent / model  # as for data: in the recipe's folder, otherwise in the current folder
    if beside.exists() and ("/" in model or model.endswith(".gguf")) and not Path(model).is_absolute():
        found = settings.model.model_copy(update={"path": str(beside)})
        settings = settings.model_copy(update={"model": found})
    return settings


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the recipe's table, with the overrides applied. Raises UserError like ``load_settings``."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; pass a recipe file, e.g. {path}/run.toml")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe" + did_you_mean(str(path), siblings)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return override(raw, overrides)


def override(raw: dict[str, Any], overrides: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """Apply ``key=value`` items to the table, in place, and return it."""
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key.strip():
            raise UserError(f"{flag} {item} is not KEY=VALUE; pass, for example, {flag} stages.rl.steps=50")
        try:
            value = tomllib.loads(f"x = {text.strip()}")["x"]
        except tomllib.TOMLDecodeError:
            value = text.strip()  # a bare word is a string
        node: Any = raw
        *parents, leaf = [part.strip() for part in key.split(".")]
        for part in parents:
            node = _child(node, part, f"{flag} {item}")
        if not isinstance(node, dict):
            raise UserError(f"{flag} {item}: {'.'.join(parents)} is not a table")
        node[leaf] = value
    return raw


def parse_settings(raw: dict[str, Any], *, where: str) -> Settings:
    return parse(Settings, raw, where=where)


def parse(model: type[M], raw: dict[str, Any], *, where: str) -> M:
    """Validate a table as a settings model. Raises UserError with one line that names the key."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + one_line(error, model, raw)) from None


def _child(node: Any, part: str, item: str) -> Any:
    if isinstance(node, list):  # stages are addressed by name, kind or number
        for i, entry in enumerate(node):
            if isinstance(entry, dict) and part in (entry.get("name"), entry.get("kind"), str(i)):
                return entry
        raise UserError(f'{item}: no stage is called "{part}"')
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise UserError(f"{item}: {part} cannot be set inside a value that is not a table")


def table_of(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values, for a file. Stages are dumped one by one: within the whole table, pydantic
    writes the truth values among ``method_options`` as numbers."""
    return {
        **settings.model_dump(mode="json"),
        "stages": [s.model_dump(mode="json") for s in settings.stages],
    }


_NEWER: tuple[tuple[str, Any], ...] = (
    ("date", PINNED_DATE), ("save_every_minutes", 0), ("rollout_ahead", 0), ("benchmark_checker", "auto"), ("scorers", []),
    ("columns", {}), ("train_turns", "all"), ("overlong_share", OVERLONG_SHARE), ("epochs_of", ""), ("special_tokens", []),
    ("vllm", VllmSettings().model_dump(mode="json")),
    ("template", "model"), ("rope_scaling", "model"), ("freeze", []), ("no_decay", []), ("decay_fraction", 0.1),
    ("validation", ValidationSettings().model_dump(mode="json")),
    ("early_stopping", EarlyStoppingSettings().model_dump(mode="json")),
)  # fmt: skip
_NEWER_OF_RL = (*_NEWER, ("engine", "torch"))


def _identity(part: Any) -> Any:
    """Return a dumped table without the newer settings that have their defaults, so that results from before
    these settings keep their identity."""
    if isinstance(part, list):
        return [_identity(value) for value in part]
    if not isinstance(part, dict):
        return part
    newer = _NEWER_OF_RL if part.get("kind") == "rl" else _NEWER
    return {key: _identity(value) for key, value in part.items() if (key, value) not in newer}


def settings_hash(*parts: BaseModel | dict[str, Any] | str | int | float) -> str:
    """Return the identity of a stage or a run, 12 hex digits of a hash of its settings in canonical JSON."""
    payload = [_identity(p.model_dump(mode="json") if isinstance(p, BaseModel) else p) for p in parts]
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
