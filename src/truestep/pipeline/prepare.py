"""Checks a recipe before anything expensive starts: data rows, gold answers, lengths and batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.data.chat import check_special_tokens, encode_prompt, stop_token_ids
from truestep.data.demonstrations import Encoded, encode_demonstrations
from truestep.data.describe import describe, needs_of, not_used, read_as, use_of
from truestep.data.files import files_of
from truestep.data.overlap import overlap_report, trained_on_too
from truestep.data.problems import BadRows, each_row, load_problems
from truestep.data.templates import choose_template
from truestep.device import world
from truestep.errors import Faults, UserError, count, verb
from truestep.model.load import TINY_CONTEXT, load_tokenizer, model_content, read_config, resolve
from truestep.model.lora import check_trained
from truestep.model.rope import override
from truestep.objective.corrections import REWEIGHTING
from truestep.objective.methods import METHODS, Method, build, fits_older_samples
from truestep.pipeline.code import code_of
from truestep.pipeline.golds import check_golds
from truestep.pipeline.history import History, as_named
from truestep.pipeline.prompts import prompts_of_stage
from truestep.pipeline.reward_check import check_rewards
from truestep.pipeline.sizes import check_lengths, check_tested
from truestep.pipeline.systems import notes_of_systems
from truestep.pipeline.track import require_trackers
from truestep.records import Demonstration, Problem, Prompt
from truestep.rollout.engine_vllm import client_of
from truestep.rollout.vllm_server import installed_version, python_with_vllm
from truestep.rollout.vllm_weights import require_server, require_version
from truestep.settings import RejectionSettings, RlSettings, Settings, SftSettings, StageSettings
from truestep.train.update import fault_of
from truestep.user_code import Raised, attempt, find_source, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Prepared:
    """All data of a run as tokens, after all checks."""

    settings: Settings
    named: Settings  # with the names of files that the recipe had at first; identities contain them
    base_dir: Path  # the recipe's folder; files that the recipe names are relative to it
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    stop_ids: tuple[int, ...]
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)
    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    # Of stages that sample, by name: the prompts of each of their data sets.
    stage_prompts: dict[str, list[list[Prompt]]] = field(default_factory=dict)
    model_content: str = ""  # hash of the base model's files
    content: dict[str, str] = field(default_factory=dict)  # hash of each data set's content
    methods: dict[str, Method] = field(default_factory=dict)  # by stage name
    code: dict[str, dict[str, str]] = field(default_factory=dict)  # ``code_of`` each stage, by name
    overlap: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_plain: bool = (
        False  # the plain template, for a tokenizer without one: what was once used without asking
    )
    history: History = field(default_factory=History)  # of the run that is continued


def prepare(
    settings: Settings,
    *,
    base_dir: Path,
    history: History | None = None,
    problems: Mapping[str, list[Problem]] | None = None,
) -> Prepared:
    """Load and check everything that a run needs, within seconds and without a model. ``problems`` are the data
    sets if they have been read (``read_problems``); stages with other sets are then left out. Raises a UserError
    that names each fault with its file, row and field, or setting, and remedy."""
    faults = Faults()
    with faults.caught():
        _check_evaluation(settings)
    methods = usable_methods(settings, base_dir, faults)
    usable = [stage for stage in settings.stages if stage.name in methods]
    for check in (_check_engines, lambda given: require_trackers(given.trackers, base_dir)):
        with faults.caught():
            check(settings)
    code = dict(_hashes(usable, base_dir, faults))
    if problems is None:
        problems = read_problems(settings, methods, base_dir, faults)
    prepared = None
    with faults.caught():
        prepared = _opened(settings, base_dir, history)
    _check_rewards(prepared, settings, code, problems, base_dir, faults)
    if prepared is None:
        faults.refuse()
        raise AssertionError("without a fault, there is a tokenizer")
    prepared.methods = methods
    pairs = zip(settings.stages, prepared.named.stages, strict=True)
    prepared.code = {s.name: _as_named(code[s.name], s, n) for s, n in pairs if s.name in code}
    needs = needs_of(settings, _guided(settings, methods))
    for name, of_set in problems.items():
        with faults.caught():
            try:
                _encode(prepared, name, of_set, needs[name])
            except BadRows as error:
                raise _of_set(name, error) from None
    check_golds(prepared, [n for n in prepared.problems if "answer" in needs[n]], faults)
    for stage in usable:
        if all(name in prepared.problems for name in stage.data_names):
            with faults.caught():
                if not isinstance(stage, SftSettings):
                    prepared.stage_prompts[stage.name] = prompts_of_stage(prepared, stage)
                check_lengths(prepared, stage)
    dev = [stage.dev.data for stage in usable if stage.dev.data]
    for name in dict.fromkeys((*dev, *settings.evaluate.data)):
        if name in prepared.problems:
            with faults.caught():
                check_tested(prepared, name)
    faults.refuse()
    found = prepared.problems
    trained = {name: found[name] for s in settings.stages for name in s.data_names if name in found}
    tested = {name: found[name] for name in settings.evaluate.data if name in found}
    prepared.notes += notes_of_systems(settings, trained, tested)
    watched = [name for stage in settings.stages for name in stage.watched_data.values()]
    tested |= {name: found[name] for name in watched if name in found}
    prepared.overlap = overlap_report(trained, tested) if trained and tested else {}
    prepared.notes += trained_on_too(trained, tested)
    return prepared


def _check_evaluation(settings: Settings) -> None:
    if settings.evaluate.benchmarks:
        raise UserError(
            "evaluate.benchmarks is set, but a run evaluates only evaluate.data; use truestep eval RECIPE"
        )
    if settings.evaluate.engine != "torch":
        raise UserError(
            "evaluate.engine: evaluate.data is always sampled with torch; remove evaluate.engine, or evaluate benchmarks"
        )


def _opened(settings: Settings, base_dir: Path, history: History | None) -> Prepared:
    """Open the tokenizer and check it with the chat settings. Raises UserError."""
    named = as_named(settings, base_dir, history) if history is not None else settings
    tokenizer = load_tokenizer(settings.model)
    is_plain = getattr(tokenizer, "chat_template", None) is None and settings.chat.template == "plain"
    choose_template(tokenizer, settings.chat.template, settings.model.path)
    context, eos = context_and_eos(settings)
    prepared = Prepared(
        settings=settings, base_dir=base_dir, history=history or History(),
        is_plain=is_plain, tokenizer=tokenizer, context_length=context,
        stop_ids=stop_token_ids(tokenizer, eos), model_content=model_content(settings.model),
        # Sets that were used before a change are part of identities, too.
        content=dict(history.content) if history is not None and history.changes else {},
        named=named,
    )  # fmt: skip
    check_special_tokens(tokenizer, settings.chat, prepared.stop_ids)
    check_trained(settings.model, settings.stages)
    return prepared


def read_problems(
    settings: Settings, methods: Mapping[str, Method], base_dir: Path, faults: Faults
) -> dict[str, list[Problem]]:
    """Read every data set that is used, with the columns that are needed. A set with a fault is left out."""
    guided, found = _guided(settings, methods), {}
    for name, wanted in needs_of(settings, _guided(settings, methods)).items():
        with faults.caught():
            try:
                data, seed = settings.data[name], settings.seed
                found[name] = load_problems(name, data, seed=seed, base_dir=base_dir, needs=sorted(wanted))
            except UserError as error:
                if name not in guided or "solution" not in str(error):
                    raise _of_set(name, error) from None
                method = methods[guided[name]].name
                reason = f'stages.{guided[name]}.method = "{method}" trains on solutions'
                raise UserError(f"{error} ({reason})") from None
    return found


def _of_set(name: str, error: UserError) -> UserError:
    """Return an error about a file with the name of the data set that reads it."""
    named = f"data.{name}"
    return UserError(*(f if named in f else f"{named}: {f}" for f in error.faults))


def _guided(settings: Settings, methods: Mapping[str, Method]) -> dict[str, str]:
    """Return the data sets whose solutions a stage that samples trains on, with the stage's name."""
    sampled = [s for s in settings.stages if isinstance(s, RlSettings) and s.name in methods]
    return {name: s.name for s in sampled if methods[s.name].needs_demonstrations for name in s.guided}


def _check_engines(settings: Settings) -> None:
    """Raise UserError if an RL stage asks for vLLM and it is not there, or not in a version that was tested."""
    if not any(isinstance(stage, RlSettings) and stage.engine == "vllm" for stage in settings.stages):
        return
    for url in settings.vllm.attach:
        require_server(replace(client_of(url), seconds=30.0))
    if not settings.vllm.attach:
        python = python_with_vllm()
        version = installed_version(python)
        require_version(version, f"{python} has vLLM {version}")


def _hashes(
    stages: Sequence[StageSettings], base_dir: Path, faults: Faults
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the hashes of each stage's code."""
    for stage in stages:
        with faults.caught():
            yield stage.name, code_of(stage, base_dir)


def _check_rewards(
    prepared: Prepared | None,
    settings: Settings,
    names: Collection[str],
    problems: Mapping[str, list[Problem]],
    base_dir: Path,
    faults: Faults,
) -> None:
    """Load and try the rewards of every stage with a code hash, so that mistakes are found before training."""
    tokenizer = prepared and prepared.tokenizer
    for stage in settings.stages if world()[0] == 0 else ():
        if isinstance(stage, RlSettings) and stage.name in names:
            with faults.caught():
                rows = problems.get(stage.data_names[0], ())
                check_rewards(stage, rows, settings, base_dir, tokenizer)


def _as_named(code: dict[str, str], stage: StageSettings, named: StageSettings) -> dict[str, str]:
    method = {getattr(stage, "method", ""): getattr(named, "method", "")}
    return {method.get(name, name): sha256 for name, sha256 in code.items()}


def usable_methods(settings: Settings, base_dir: Path, faults: Faults) -> dict[str, Method]:
    """Return the methods of the stages, by name, without those of stages that they do not fit."""
    found = {}
    for stage in settings.stages:
        with faults.caught():
            found[stage.name] = _usable_method(stage, base_dir)
    return found


def check_methods(settings: Settings, base_dir: Path) -> None:
    faults = Faults()
    usable_methods(settings, base_dir, faults)
    faults.refuse()


def _usable_method(stage: StageSettings, base_dir: Path) -> Method:
    fault_of(stage.faults)
    row, is_sft = method_of(stage, base_dir), isinstance(stage, SftSettings)
    if isinstance(stage, RejectionSettings):
        return row
    assert isinstance(stage, SftSettings | RlSettings)
    if (row.plan is None) != is_sft:
        known = ", ".join(name for name in METHODS if (METHODS[name]().plan is None) == is_sft)
        fault = f'method = "{stage.method}" does not fit kind = "{stage.kind}"'
        raise UserError(f"stages.{stage.name}.{fault}; set one of {known}")
    if isinstance(stage, RlSettings) and stage.rollout_ahead and (fault := row.staleness_fault):
        fitting = ", ".join(name for name in METHODS if fits_older_samples(name))
        raise UserError(
            f'stages.{stage.name}.rollout_ahead = {stage.rollout_ahead}: method = "{stage.method}" cannot train on '
            f"samples of older weights: {fault}; set rollout_ahead = 0, or method_options.correction = "
            f'"truncate" (or {", ".join(REWEIGHTING[1:])}) with one of {fitting}'
        )
    if isinstance(stage, SftSettings) and stage.sequences_per_step % (num := row.updates_per_step):
        raise UserError(
            f"stages.{stage.name}.sequences_per_step = {stage.sequences_per_step} cannot be split into the "
            f'{num} equal updates of method = "{row.name}"; set a multiple of {num}'
        )
    return row


def method_of(stage: StageSettings, base_dir: Path) -> Method:
    """Build the stage's method. Raises UserError."""
    options = getattr(stage, "method_options", {})
    return find_method(getattr(stage, "method", "sft"), options, base_dir, f"stages.{stage.name}.")


def find_method(named: str, options: Mapping[str, Any], base_dir: Path, where: str = "") -> Method:
    """Build a built-in method, or the one of FILE.py:NAME in the recipe's folder. Raises UserError."""
    if ":" in named:
        source = find_source(named, base_dir, what=f"{where}method")
        row = _user(f"{where}method", load, source, [str(base_dir)])
        method = _user(f"{where}method", build, row, options)
        if not isinstance(method, Method):
            raise UserError(f'{where}method: "{named}" returned {type(method).__name__}, not a Method')
        return method
    try:
        return build(named, options)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}{error}") from None


def _user(where: str, work: Callable[..., Any], *given: Any) -> Any:
    """Call a function that runs a user's code. Raises UserError with the code's traceback."""
    result = attempt(work, *given)
    if isinstance(result, Raised):
        raise UserError(f"{where}: {result.reason}\n{result.detail}".rstrip())
    return result


def context_and_eos(settings: Settings) -> tuple[int, Any]:
    """Return the model's context length (with the recipe's override) and eos ids, without loading weights. Raises
    UserError if the override cannot be applied."""
    source, length = resolve(settings.model), settings.model.context_length
    if source == "tiny":
        return (TINY_CONTEXT if length == "model" else length), ()
    config = read_config(source)
    override(config, settings.model)
    context = int(getattr(config, "max_position_embeddings", 0) or 2**20)
    return context, getattr(config, "eos_token_id", None)


def _encode(prepared: Prepared, name: str, problems: list[Problem], wanted: set[str]) -> None:
    """Make prompts and demonstrations of a data set. Raises UserError, after which the set is not in ``problems``."""
    settings, tokenizer, context = prepared.settings, prepared.tokenizer, prepared.context_length
    prepared.content[name] = _content_hash(problems)
    described = describe(problems, wanted)
    remarks = [
        files_of(name, settings.data[name], prepared.base_dir)[2],
        *read_as(described),
        *not_used(described, use_of(settings, name), wanted),
    ]
    prepared.notes += [f"data.{name}: {said}" for said in remarks if said]
    if wanted & {"answer", "problem"}:
        prepared.prompts[name] = [
            made for _, made in each_row(problems, lambda p: encode_prompt(tokenizer, p, settings.chat))
        ]
    if "solution" in wanted:
        made = encode_demonstrations(tokenizer, problems, settings.chat, context)
        prepared.demonstrations[name] = made.kept
        prepared.notes += [f"data.{name}: {said}" for said in of_sequences(made, len(problems), context)]
    prepared.problems[name] = problems


def of_sequences(made: Encoded, num_rows: int, context: int) -> list[str]:
    """Return sentences about rows that are not one sequence each."""
    num, found = len(made.kept) + made.num_long, []
    if made.num_split:
        found.append(
            f"{count(made.num_split, 'dialogue', num_rows)} {verb(made.num_split, 'become')} several sequences, because the "
            "chat template does not write earlier turns as they were sampled (for example without their thoughts)"
        )
    if made.num_cut:
        found.append(
            f"{count(made.num_cut, 'text', num_rows)} {verb(made.num_cut, 'are')} cut into pieces of {context} tokens, the context"
        )
    if made.num_long:
        found.append(
            f"{count(made.num_long, 'demonstration', num)} {verb(made.num_long, 'are')} longer than the context of {context} "
            f"tokens and {verb(made.num_long, 'are')} left out"
        )
    return found


def _content_hash(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for p in problems:
        turns = "\x1e".join(f"{m.role}\x1d{m.content}" for m in p.messages)
        meta = json.dumps([dict(p.meta), dict(p.columns)], sort_keys=True, default=str)
        columns = (p.id, turns, p.answer, p.checker, p.solution, meta, *_rich(p))
        digest.update(("\x1f".join(columns) + "\x1c").encode())
    return digest.hexdigest()[:16]


def _rich(problem: Problem) -> tuple[str, ...]:
    """Return what a row has besides texts, for its hash: nothing for most rows."""
    turns = problem.dialogue or problem.messages
    num_trained = sum(m.is_trained for m in problem.dialogue if m.role == "assistant")
    if num_trained < 2 and not (any(m.more for m in turns) or problem.tools or problem.text):
        return ()
    parts = [[m.role, m.content, m.is_trained, dict(m.more)] for m in turns]
    return (json.dumps([parts, [dict(tool) for tool in problem.tools], problem.text], sort_keys=True),)
