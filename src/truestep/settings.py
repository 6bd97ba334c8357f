"""The settings of a run, as frozen pydantic models that are read from one TOML file. Unknown keys, duplicate
keys and contradictions are errors with a remedy. ``resolved.toml`` in the run directory has every setting.

A batch size is named after what it counts. Batch sizes that are not settings are derived from those that are. The
text below a key is its meaning and an example, for docs/reference/settings.md and ``truestep settings``.
One file: the models refer to each other."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, model_validator

from truestep.data_settings import OVERLONG_SHARE, Checker
from truestep.data_settings import DataSettings as DataSettings
from truestep.errors import UserError, did_you_mean, refused
from truestep.frozen import Frozen
from truestep.http_client import LOOPBACK
from truestep.redaction import INSTEAD, find_secret
from truestep.reward_settings import FORM as CODE
from truestep.reward_settings import RewardSettings, reward_entries
from truestep.stage_settings import DevSettings as DevSettings
from truestep.stage_settings import (
    EarlyStoppingSettings,
    LoraSettings,
    RlSettings,
    SamplingSettings,
    ValidationSettings,
)
from truestep.stage_settings import FaultSettings as FaultSettings
from truestep.stage_settings import OptimizerSettings as OptimizerSettings
from truestep.stage_settings import RejectionSettings as RejectionSettings
from truestep.stage_settings import SftSettings as SftSettings
from truestep.stage_settings import StageSettings as StageSettings

M = TypeVar("M", bound=Frozen)
Positive = Annotated[int, Field(ge=1)]
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")
Pinned = Literal["benchmark"]  # the value in the table of benchmarks


class TinySettings(Frozen):
    """The built-in model, a newly initialized Llama of about 1 M parameters. Each printable ASCII character and the
    line break is one token; rows with other characters are refused."""

    hidden_size: int = Field(128, ge=8, multiple_of=8)
    """Width of the model. Example: ``hidden_size = 96``"""
    num_layers: int = Field(4, ge=1)
    """Number of layers. Example: ``num_layers = 3``"""
    num_heads: int = Field(4, ge=1)
    """Number of attention heads. hidden_size must be a multiple of twice this number.
    Example: ``num_heads = 8``"""
    intermediate_size: int = Field(384, ge=8)
    """Width of the layers' MLP. Example: ``intermediate_size = 256``"""

    @model_validator(mode="after")
    def _heads(self) -> Self:
        size, even = self.hidden_size, 2 * self.num_heads
        if size % even:
            raise ValueError(f"hidden_size = {size} is not a multiple of {even} (2 x num_heads)")
        return self


class ModelSettings(Frozen):
    path: str
    """The model: "tiny", "smollm2-135m-instruct", a Hugging Face folder, a run directory (its last model), a .gguf
    file or a hub id.
    Example: ``path = "Qwen/Qwen2.5-0.5B"``"""
    context_length: Annotated[int, Field(ge=8)] | Literal["model"] = "model"
    """Number of positions. Beyond the model's own, rope_scaling or rope_theta must say how they are reached.
    Example: ``context_length = 2048``"""
    rope_theta: Annotated[float, Field(gt=0)] | Literal["model"] = "model"
    """Base of RoPE, instead of the model's own. Example: ``rope_theta = 40000``"""
    rope_scaling: Literal["model", "none", "linear", "yarn"] = "model"
    """How RoPE reaches positions beyond the model's own: by YaRN, by interpolation, or not at all ("none").
    Example: ``rope_scaling = "yarn"``"""
    tiny: TinySettings = TinySettings()
    """The shape of the built-in model, if path = "tiny".
    Example: ``tiny = { hidden_size = 96, num_layers = 3 }``"""


class ComputeSettings(Frozen):
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Threads of each process. Results are bit-exact only for a fixed number. "auto": OMP_NUM_THREADS,
    otherwise all cores that may be used, divided among the ranks. Example: ``threads = 1``"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """The dtype in which the model computes. With bfloat16, the optimizer keeps float32 weights.
    Example: ``dtype = "bfloat16"``"""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several ranks hold the model: each a copy ("ddp", also "auto"), or each a shard ("fsdp2").
    Example: ``parallel = "fsdp2"``"""
    gradient_checkpointing: bool | Literal["selective"] = False
    """Compute activations again in the backward pass, which saves memory. "selective" keeps the matrix
    products. Example: ``gradient_checkpointing = "selective"``"""
    compile: bool = False
    """Compile the model's layers with torch.compile. Example: ``compile = true``"""
    offload: Literal["none", "optimizer"] = "none"
    """Keep the optimizer's float32 weights and moments in host memory. Example: ``offload = "optimizer"``"""
    offload_activations: bool = False
    """Keep what gradient_checkpointing = true saves between layers in host memory.
    Example: ``offload_activations = true``"""

    @model_validator(mode="after")
    def _saves_inputs(self) -> Self:
        if self.offload_activations and self.gradient_checkpointing is not True:
            raise ValueError("offload_activations = true needs gradient_checkpointing = true; set it")
        return self


PINNED_DATE = "2024-07-26"


class ChatSettings(Frozen):
    """The format in which a problem becomes a prompt. It is the same in SFT, RL and evaluation."""

    system: str = ""
    r"""The system turn of every prompt whose row has none. "": no system turn.
    Example: ``system = "Put the answer into \\boxed{}."``"""
    user: str = "{problem}"
    r"""The user's turn, for rows whose problem is plain text. {problem} stands for the problem.
    Example: ``user = "{problem}\nThink step by step."``"""
    generation_suffix: str = ""
    r"""Text at the end of every prompt. A demonstration that begins with it is not given it twice.
    Example: ``generation_suffix = "<think>\n"``"""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that texts of the data may contain and that stay in the text of completions.
    Example: ``special_tokens = ["<think>", "</think>"]``"""
    template: Literal["model", "plain", "alpaca", "user-assistant", "chatml", "llama3"] = "model"
    """The chat template. "model" is the tokenizer's own; a base model needs one of the others.
    Example: ``template = "chatml"``"""
    date: str = PINNED_DATE
    """The date that a chat template may write. Today's date would change the prompts every day.
    Example: ``date = "2025-01-31"``"""

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


# Keys of a stage, and of [compute], that affect only memory, speed, files and rounding. They are not part of its
# identity and may change on resuming.
OUTSIDE_RESULTS = {
    "save_every": 1,
    "save_every_minutes": 0,
    "keep_checkpoints": 1,
    "tokens_per_microbatch": 1,
}
OUTSIDE_COMPUTE = {
    "threads": 1, "parallel": "auto", "gradient_checkpointing": False, "compile": False,
    "offload": "none", "offload_activations": False,
}  # fmt: skip


class VllmSettings(Frozen):
    """vLLM servers for RL stages with engine = "vllm". They change speed and memory, not what is sampled from."""

    attach: tuple[str, ...] = ()
    """Addresses of running servers. If it is empty, truestep starts its own.
    Example: ``attach = ["http://127.0.0.1:8000"]``"""
    servers: int = Field(1, ge=1)
    """How many servers to start. The samples of a problem go to the same one. Example: ``servers = 2``"""
    devices: tuple[str, ...] = ()
    """GPUs of each server, one text per server. If it is empty, every server may use all.
    Example: ``devices = ["2,3"]``"""
    options: tuple[str, ...] = ()
    """Further arguments of vLLM's command line. Example: ``options = ["--tensor-parallel-size", "2"]``"""
    transfer: Literal["file", "broadcast"] = "file"
    """How new weights reach the servers: as files, or from memory to memory.
    Example: ``transfer = "broadcast"``"""
    folder: str = ""
    """The folder in which weights are handed over. Trainer and servers must both see it. "": shared memory.
    Example: ``folder = "/shared/weights"``"""
    sleep: bool = False
    """Whether servers give up their memory while the trainer updates, if both use the same GPU.
    Example: ``sleep = true``"""
    restarts: int = Field(3, ge=0)
    """How many servers that die are started again in one stage. Example: ``restarts = 0``"""

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
    """The temperature. 0 takes the most probable token. "benchmark": the value in the table of benchmarks.
    Example: ``temperature = 0.6``"""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample only from the most probable tokens that together have this probability. 1: from all.
    Example: ``top_p = 0.95``"""
    top_k: int = Field(0, ge=0)
    """Sample only from this many most probable tokens. 0: from all. Example: ``top_k = 20``"""
    max_new_tokens: Positive | Pinned = "benchmark"
    """The length limit of a completion in tokens. "benchmark": the value in the table of benchmarks.
    Example: ``max_new_tokens = 1024``"""
    max_running: int = Field(64, ge=1)
    """How many samples are decoded, or requests sent, at once. It changes only memory and speed.
    Example: ``max_running = 128``"""

    def resolved(self, temperature: float, max_new_tokens: int) -> SamplingSettings:
        """Return the sampling settings, with these values in place of "benchmark"."""
        pinned = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        given = {key: value for key, value in self.model_dump().items() if value != "benchmark"}
        return SamplingSettings.model_validate(pinned | given)


class EvaluateSettings(Frozen):
    """The evaluation of a run's checkpoints on its data sets or, with ``truestep eval``, of any model on
    pinned ``benchmarks``. For these, ``samples_per_problem`` and ``sampling`` default to "benchmark"."""

    data: tuple[str, ...] = ()
    """The run's data sets on which every checkpoint is tested. Example: ``data = ["test"]``"""
    before: bool = True
    """Whether the base model is also tested. Example: ``before = false``"""
    samples_per_problem: Positive | Pinned = 1
    """Samples of each problem. With benchmarks, the default is "benchmark": each benchmark's own number.
    Example: ``samples_per_problem = 4``"""
    pass_at: tuple[int, ...] = (1,)
    """The k of pass@k on data sets; none may exceed samples_per_problem. A benchmark gets every k.
    Example: ``pass_at = [1]``"""
    sampling: EvaluationSampling = EvaluationSampling(temperature=0.6, max_new_tokens=256)
    """How completions are sampled. With benchmarks, the defaults are each benchmark's own.
    Example: ``sampling = { temperature = 0.6, max_new_tokens = 512 }``"""
    benchmarks: tuple[str, ...] = ()
    """Ids of benchmarks (truestep eval list shows them), or your own files and folders: PATH or NAME=PATH.
    Example: ``benchmarks = ["math500", "sums=my.jsonl"]``"""
    benchmark_checker: Checker | Literal["auto"] = "auto"
    """The checker of your own benchmarks, instead of a row's. "auto": the row's, "exact" for choices,
    otherwise "math". Example: ``benchmark_checker = "exact"``"""
    benchmark_columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns of your own benchmarks: our name = the file's, as in [data.NAME]. A file without the column is
    read without the name.
    Example: ``benchmark_columns = { problem = "prompt_text", answer = "label" }``"""
    scorers: tuple[RewardSettings, ...] = ()
    """Rewards that every sample of a benchmark gets, next to its verdict.
    Example: ``scorers = [{ function = "format" }]``"""
    folder: str = ""
    """The folder that contains ID.jsonl, ID.parquet or ID.csv for each benchmark. "": the Hugging Face hub.
    Example: ``folder = "benchmarks"``"""
    engine: str = "torch"
    """What samples: "torch", "vllm", or the URL of an OpenAI-compatible endpoint. Used by truestep eval.
    Example: ``engine = "http://127.0.0.1:8000/v1"``"""
    prompts: tuple[str, ...] = ("benchmark",)
    """Prompt templates of the benchmarks: paper, qwen, plain, question, completion, brief, odd, or FILE.toml. "benchmark": each
    benchmark's own. Example: ``prompts = ["paper", "qwen"]``"""
    few_shot: int = Field(0, ge=0, le=8)
    """Worked examples that a benchmark's prompt shows before the problem. Example: ``few_shot = 4``"""
    limit: Positive | Literal["all"] = "all"
    """How many problems of each benchmark are used. Example: ``limit = 100``"""
    limits: dict[str, Positive] = Field(default_factory=dict)
    """The same for single benchmarks, instead of limit. Example: ``limits = { math500 = 50 }``"""

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
    """The name of the run: in its folder, on its page and in trackers. Example: ``name = "sums"``"""
    seed: int = Field(0, ge=0)
    """The seed of everything random: order of the data, sampling, a new model, generated problems.
    Example: ``seed = 1``"""
    model: ModelSettings
    """The model that the first stage starts from. Example: ``model = { path = "tiny" }``"""
    compute: ComputeSettings = ComputeSettings()
    """How the run uses the machine. Example: ``compute = { threads = 1, dtype = "bfloat16" }``"""
    chat: ChatSettings = ChatSettings()
    """The format in which a problem becomes a prompt. Example: ``chat = { template = "plain" }``"""
    data: dict[str, DataSettings]
    """The data sets, by names of your choice, which stages and evaluate.data refer to.
    Example: ``data.train = { source = "rows.jsonl" }``"""
    stages: tuple[Stage, ...] = ()
    """The stages, in the order in which they run. Each starts from the model of the one before.
    A run without stages only evaluates. Example: ``stages = []``"""
    evaluate: EvaluateSettings = EvaluateSettings()
    """The evaluation of the base model and of each stage's model.
    Example: ``evaluate = { data = ["test"], pass_at = [1] }``"""
    vllm: VllmSettings = VllmSettings()
    """vLLM servers, for RL stages with engine = "vllm". Example: ``vllm = { servers = 2 }``"""
    trackers: tuple[str, ...] = ()
    """Where the config, metrics and scores are also sent: tensorboard, wandb, trackio, mlflow, swanlab, or FILE.py:NAME
    in the recipe's folder (docs/how-to/trackers.md). Example: ``trackers = ["tensorboard"]``"""
    group: str = ""
    """The group of the run in its trackers. A study sets its name. Example: ``group = "ablation"``"""
    declared: dict[str, Any] = Field(default_factory=dict)
    """Facts for truestep run --dry-run without weights and data. If it is set, a dry run reads neither.
    Example: ``declared.rows = { train = 46000 }``"""

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
        for name in self.trackers:
            if name not in TRACKERS and not CODE.fullmatch(name):
                hint = did_you_mean(name, TRACKERS)
                raise ValueError(
                    f'trackers: "{name}" is not one of {", ".join(TRACKERS)}, or FILE.py:NAME{hint}'
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
        made = model.model_validate(raw)
    except ValidationError as error:
        raise refused(where, error, model, raw) from None
    if found := list(_converted(raw, made)):
        raise UserError(
            *(
                f"{where}: {key}: expected {json.dumps(read)}, got {given!r}; write it without quotes"
                for key, given, read in found
            )
        )
    return made


def _converted(raw: Any, made: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the key and both values of every text that pydantic has read as a number or a truth value."""
    if isinstance(raw, str) and isinstance(made, int | float):
        yield key, raw, made
    elif isinstance(raw, dict):
        for name, value in raw.items():
            inner = made.get(name) if isinstance(made, dict) else getattr(made, name, None)
            yield from _converted(value, inner, f"{key}.{name}".lstrip("."))
    elif isinstance(raw, list | tuple) and isinstance(made, list | tuple):
        for value, inner in zip(raw, made, strict=False):
            label = getattr(inner, "name", "")
            yield from _converted(value, inner, f"{key}.{label}" if label else key)


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
    ("date", PINNED_DATE), ("save_every_minutes", 0), ("rollout_ahead", 0), ("benchmark_checker", "auto"),
    ("benchmark_columns", {}), ("scorers", []),
    ("columns", {}), ("train_turns", "all"), ("overlong_share", OVERLONG_SHARE), ("epochs_of", ""), ("special_tokens", []),
    ("vllm", VllmSettings().model_dump(mode="json")),
    ("template", "model"), ("rope_scaling", "model"), ("freeze", []), ("no_decay", []), ("decay_fraction", 0.1),
    ("validation", ValidationSettings().model_dump(mode="json")),
    ("early_stopping", EarlyStoppingSettings().model_dump(mode="json")), ("group", ""),
    ("lora", LoraSettings().model_dump(mode="json")), ("offload", "none"), ("offload_activations", False),
    ("demonstrations", []),
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
