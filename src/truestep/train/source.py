"""The data that a step trains on: shuffled demonstrations, or rollouts graded and gated by a method.

Both are pure functions of the step and the method's memory, so a resumed run does not need a cursor, and an
interrupted rollout is sampled again from its seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from truestep import seeding
from truestep.flops import Ledger
from truestep.objective.methods import Method
from truestep.objective.methods.row import DemonstrationBuffer, Refill, Replay, Stream
from truestep.records import Demonstration, Group, Origin, Prompt, Rollout, Stop, TrainSequence
from truestep.rollout.sample import Sampler
from truestep.train import sequences as seq
from truestep.train.beside import Beside
from truestep.train.memory import Memory, choose_replays, decide, remember, seen_of, with_waiting
from truestep.train.metrics import OF_GROUPS, Meter, of_groups, of_sets
from truestep.train.order import Order, window
from truestep.train.parallel import Ranks
from truestep.train.scoring import Scorer
from truestep.train.sequences import GatedGroup, demonstration_sequence
from truestep.train.waiting import Sampled, Whole

STREAM_GROUP = 1 << 30  # demonstrations outside the sampled groups get group numbers from here


@dataclass(frozen=True, kw_only=True)
class StepData:
    """The sequences of one step on this rank, cut into the mini-batches of its optimizer updates.
    ``buffered`` are sequences for an additional update by the buffer's separate optimizer, ``controls`` the
    controller's values, and ``memory`` the method's memory after the step."""

    minibatches: list[list[TrainSequence]]
    buffered: list[TrainSequence] | None = None
    controls: Mapping[str, float] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    ledger: Ledger = field(default_factory=Ledger)


@dataclass
class DemonstrationSource:
    """A source of shuffled demonstrations, ``sequences_per_step`` per step and ``num_sequences`` in total."""

    order: Order[Demonstration]
    _: KW_ONLY
    sequences_per_step: int
    num_sequences: int
    seed: int
    ranks: Ranks
    updates_per_step: int = 1

    def drop(self) -> None:
        """Nothing: no step is begun before it is taken."""

    def take(self, step: int, memory: Memory) -> StepData:
        chosen = self.order.at(step, self.sequences_per_step, self.seed, limit=self.num_sequences)
        sequences = [seq.whole_demonstration(d, i) for i, d in enumerate(chosen)]
        size = -(-self.sequences_per_step // self.updates_per_step)
        mine = [self.ranks.mine(sequences[i * size : (i + 1) * size]) for i in range(self.updates_per_step)]
        trained = sum(s.num_trained for cut in mine for s in cut)
        context = sum(len(s.token_ids) for cut in mine for s in cut) - trained
        ledger = Ledger(demonstration_tokens=trained, prompt_tokens=context)
        return StepData(
            minibatches=mine, ledger=ledger, memory=memory, metrics=of_sets(d.data for d in chosen)
        )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What is sampled for a step on this rank. ``sizes`` are the numbers of prompts of the mini-batches."""

    step: int
    prompts: list[Prompt]
    sizes: list[int]
    repeats: list[int]
    places: list[tuple[int, int]]
    controls: Mapping[str, float]
    stored: Mapping[int, Rollout]
    work: Ledger


@dataclass
class RolloutSource:
    """A source of rollouts. For a method, it samples, grades and gates groups and computes advantages.

    ``take`` does this at once. ``submit`` and ``collect`` have the training of the step before in between."""

    order: Order[Prompt]
    _: KW_ONLY
    sampler: Sampler
    scorer: Scorer
    method: Method
    prompts_per_step: int
    updates_per_step: int
    decode_prompt: Callable[[Prompt], str]
    is_ahead: bool = False  # the groups of a step are sampled while the step before it trains

    def __post_init__(self) -> None:
        self.submitted: Sampled | tuple[_Planned, Beside] | None = None
        self.prompts = [prompt for prompts in self.order.sets for prompt in prompts]
        self.ranks, self._by_id = self.scorer.ranks, {p.problem.id: p for p in self.prompts}

    @property
    def runs_beside(self) -> bool:
        """Whether submitted groups are sampled in a thread, while the trainer works."""
        return self.sampler.engine.runs_beside_training

    def take(self, step: int, memory: Memory) -> StepData:
        """Sample the groups of a step now, and return its data."""
        return self.data(self.sampled(step, memory), memory)

    def sampled(self, step: int, memory: Memory) -> Sampled:
        """Sample, grade and gate the groups of a step now."""
        self.sampler.engine.take_cost()  # the work of an interrupted rollout does not belong to this step
        planned = self._planned(step, memory)
        with self.ranks.apart():  # one rank may take much longer than another
            groups = self._planned_groups(planned, self.sampler)
        return self._finished(planned, groups)

    def submit(self, step: int, memory: Memory, probe: Callable[[Callable[[], None]], Any]) -> None:
        """Begin to sample, grade and gate the groups of a step, in a thread. ``probe`` samples what engine and
        trainer are compared on, before the groups."""
        self.sampler.engine.take_cost()
        planned = self._planned(step, memory)

        def groups(check: Callable[[], None]) -> list[GatedGroup]:
            return self._planned_groups(planned, replace(self.sampler, check_stop=check))

        self.submitted = planned, Beside(probe, groups)

    def probed(self) -> Any:
        """Wait for what ``probe`` has sampled. Return None if nothing was submitted to a thread."""
        if not isinstance(self.submitted, tuple):
            return None
        with self.ranks.apart():
            return self.submitted[1].result(0, self.sampler.check_stop)

    def collect(self) -> Sampled | None:
        """Wait for the submitted groups and return them, or None if none were submitted. With a ``Refill``, the
        engine must still have the weights that it had then (a collective). Raises the error of the sampling."""
        submitted, made = self.submitted, None
        if isinstance(submitted, tuple):
            planned, beside = submitted
            with self.ranks.apart():
                groups = beside.result(1, self.sampler.check_stop)
            made = self._finished(planned, groups)
        else:
            made = submitted
        self.drop()
        return made

    def drop(self) -> None:
        """Forget what was submitted, and end its thread."""
        submitted, self.submitted = self.submitted, None
        if isinstance(submitted, tuple):
            submitted[1].drop()

    def own_prompts(self, step: int) -> list[Prompt]:
        """Return this rank's share of a step's prompts, without those of a replay store."""
        return self.ranks.mine(self.order.at(step, self.prompts_per_step, self.sampler.seed))

    def restored(self, waiting: Whole) -> Sampled:
        """Return this rank's share of the waiting groups of a checkpoint."""
        return waiting.share(self.ranks, self._by_id, self._gated)

    def _planned(self, step: int, memory: Memory) -> _Planned:
        """Return what will be sampled on this rank (a collective with a ``Replay``)."""
        controls = decide(self.method, memory, step, self.sampler.seed)
        size = self.prompts_per_step // self.updates_per_step
        chosen, replayed = self._prompts(step, memory)
        names = [p.problem.id for p in chosen]
        occurrences = [names[:i].count(name) for i, name in enumerate(names)]  # a batch may span two epochs
        numbered = list(zip(chosen, occurrences, replayed, range(len(chosen)), strict=True))
        mine = [self.ranks.mine(numbered[i : i + size]) for i in range(0, len(numbered), size)]
        flat = [part for cut in mine for part in cut]
        prompts = [prompt for prompt, *_ in flat]
        stored, scored = self._stored(prompts, [is_replayed for *_, is_replayed, _ in flat], memory, step)
        return _Planned(
            step=step, prompts=prompts, sizes=[len(cut) for cut in mine], controls=controls, stored=stored,
            repeats=[count for _, count, *_ in flat], places=[(0, number) for *_, number in flat], work=scored,
        )  # fmt: skip

    def _planned_groups(self, planned: _Planned, sampler: Sampler) -> list[GatedGroup]:
        """Sample, grade and gate what was planned. Runs in a thread if submitted; no collective."""
        given: dict[str, Any] = {"controls": planned.controls, "stored": planned.stored}
        place = (planned.step, planned.repeats)
        return self._groups(planned.prompts, planned.places, *place, sampler=sampler, **given)

    def _finished(self, planned: _Planned, groups: Sequence[GatedGroup]) -> Sampled:
        """Divide the groups into mini-batches, and refill them (a collective with a ``Refill``)."""
        left = iter(groups)
        cuts, everything = self._refill(
            [[next(left) for _ in range(size)] for size in planned.sizes], planned.step
        )
        return Sampled(
            step=planned.step, cuts=cuts, everything=everything, controls=planned.controls,
            work=planned.work + self.sampler.engine.take_cost(),
        )  # fmt: skip

    def data(self, sampled: Sampled, memory: Memory) -> StepData:
        """Turn the groups of a step into its data (a collective)."""
        step, everything, controls = sampled.step, sampled.everything, sampled.controls
        limit = self.sampler.sampling.max_new_tokens
        minibatches = [
            seq.sequences_of(part, self.method, limit) + self._stream(step * self.updates_per_step + update)
            for update, part in enumerate(sampled.cuts)
        ]
        meter = Meter(*OF_GROUPS)
        of_groups(meter, everything)
        if self.is_ahead:
            seq.of_versions(meter, minibatches, step)
        metrics = meter.reduce(self.ranks)
        parts = [key for key in metrics if key.startswith("reward/")]
        if len(parts) == 1:  # the only part is the reward itself
            del metrics[parts[0]]
        memory, buffered = self._remember(memory, everything, metrics["solved"])
        if len(self.order.sets) > 1:
            metrics |= of_sets(p.data for p in self.order.at(step, self.prompts_per_step, self.sampler.seed))
        metrics |= {f"control/{name}": value for name, value in controls.items()}
        if self.method.part(DemonstrationBuffer) is not None:
            metrics["buffer/waiting"] = float(len(memory.waiting))
        if self.method.part(Replay) is not None:
            metrics["replay/problems"] = float(len(memory.replay))
        return StepData(
            minibatches=minibatches, buffered=buffered, controls=controls, memory=memory,
            metrics={**metrics, **sampled.compared}, rows=self._shown(everything, step),
            ledger=sampled.work
            + seq.group_ledger([g.group for g in everything], [*minibatches, buffered or []]),
        )  # fmt: skip

    def _groups(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[tuple[int, int]],
        *when: Any,
        sampler: Sampler,
        **given: Any,
    ) -> list[GatedGroup]:
        """Sample and score the groups, and apply the gate to each of them once. No collective."""
        groups = sampler.groups(prompts, *when, **given)
        return [self._gated(group, place) for group, place in zip(groups, places, strict=True)]

    def _gated(self, group: Group, place: tuple[int, int]) -> GatedGroup:
        return replace(seq.gated(group, self.method, self.sampler.solved_at), place=place)

    def _shown(self, groups: Sequence[GatedGroup], step: int) -> list[Mapping[str, Any]]:
        """Return samples for the report: those of the step's first groups over all ranks (a collective)."""
        own = [g for g in groups if g.group.rollouts][: seq.NUM_SHOWN]
        rows = seq.sample_rows([g.group for g in own], step, self.sampler.decode, self.decode_prompt)
        placed = self._gathered([[*g.place, row] for g, row in zip(own, rows, strict=True)])
        return [row for *_, row in sorted(placed, key=lambda p: p[:2])[: seq.NUM_SHOWN]]

    def _prompts(self, step: int, memory: Memory) -> tuple[list[Prompt], list[bool]]:
        """Return the step's prompts over all ranks, and which of them come from the replay store."""
        chosen = self.order.at(step, self.prompts_per_step, self.sampler.seed)
        spec, replayed = self.method.part(Replay), [False] * len(chosen)
        if spec is None or not memory.replay_open:
            return chosen, replayed
        # Stored problems are spread over the batch, so that every mini-batch has its share of them.
        places = [i for i in range(len(chosen)) if int((i + 1) * spec.share) > int(i * spec.share)]
        draw = seeding.generator(self.sampler.seed, seeding.Purpose.PLAN, step, "replay")
        names = choose_replays(memory.replay, spec, len(places), list(self._by_id), draw)
        for place, name in zip(places, names, strict=False):
            chosen[place], replayed[place] = self._by_id[name], True
        return chosen, replayed

    def _stored(
        self, prompts: Sequence[Prompt], replayed: Sequence[bool], memory: Memory, step: int
    ) -> tuple[dict[int, Rollout], Ledger]:
        """Return, by place in ``prompts``, the stored sample with the lowest entropy under the current policy
        (a collective)."""
        if self.method.part(Replay) is None:
            return {}, Ledger()
        candidates = [
            (place, rollout)
            for place, prompt in enumerate(prompts)
            if replayed[place]
            for rollout in memory.replay[prompt.problem.id].rollouts
        ]
        sequences = [
            demonstration_sequence(prompts[place], rollout.completion_ids, place, Origin.STORED)
            for place, rollout in candidates
        ]
        entropies, work = self.scorer.entropy(sequences, step)
        best: dict[int, tuple[float, Rollout]] = {}
        for (place, rollout), entropy in zip(candidates, entropies, strict=True):
            if place not in best or entropy < best[place][0]:
                best[place] = (entropy, rollout)
        return {place: rollout for place, (_, rollout) in best.items()}, work

    def _refill(
        self, cuts: list[list[GatedGroup]], step: int
    ) -> tuple[list[list[GatedGroup]], list[GatedGroup]]:
        """Replace entirely dropped groups with groups of other prompts, if the method has a ``Refill``. All
        ranks draw from one shuffled order of the prompts that no rank has used in this step. The mini-batches
        are filled one after the other, so a prompt gets into the same one for any number of ranks."""
        everything = [g for cut in cuts for g in cut]
        refill = self.method.part(Refill)
        for attempt in range(0 if refill is None else refill.rounds):
            kept = [[g for g in cut if any(g.decision.keep)] for cut in cuts]
            wanted = self.ranks.gather([len(cut) - len(own) for cut, own in zip(cuts, kept, strict=True)])
            places = [
                (rank, index)
                for index in range(len(cuts))
                for rank, missing in enumerate(wanted)
                for _ in range(missing[index])
            ]
            seen = set(self._gathered([g.group.prompt.problem.id for g in everything]))
            pool = [p for p in self.prompts if p.problem.id not in seen]
            if not places or not pool:
                break
            count, item = min(len(places), len(pool)), f"refill/{step}/{attempt}"
            order = window(pool, 0, count, self.sampler.seed, item=item)
            filled = zip(reversed(range(count)), places, strict=False)
            mine = [(number, index) for number, (rank, index) in filled if rank == self.ranks.rank]
            numbers = sorted(number for number, _ in mine)
            at = [(attempt + 1, n) for n in numbers]
            with self.ranks.apart():
                fresh = self._groups([order[n] for n in numbers], at, step, sampler=self.sampler)
            everything += fresh
            for group, (_, index) in zip(reversed(fresh), mine, strict=True):
                kept[index].append(group)
            cuts = kept
        return cuts, everything

    def _stream(self, update: int) -> list[TrainSequence]:
        """Return this rank's part of the demonstrations that an update has in addition to its groups."""
        stream = self.method.part(Stream)
        share = 0.0 if stream is None else stream.share
        if share == 0:
            return []
        sampled = self.prompts_per_step // self.updates_per_step * self.sampler.samples_per_prompt
        count = max(1, round(sampled * share / (1 - share)))
        guided = self.order.without(self.sampler.unguided)
        prompts = guided.at(update, count, self.sampler.seed, item="stream")
        return self._demonstrations([p.problem.id for p in prompts])

    def _demonstrations(self, names: Sequence[str]) -> list[TrainSequence]:
        """Return this rank's part of the named problems' demonstrations."""
        return [
            demonstration_sequence(self._by_id[name], self.sampler.demonstrations[name], STREAM_GROUP + i)
            for i, name in self.ranks.mine(list(enumerate(names)))
        ]

    def _remember(
        self, memory: Memory, groups: Sequence[GatedGroup], solved: float
    ) -> tuple[Memory, list[TrainSequence] | None]:
        """Return the memory after these groups, and this rank's part of the demonstrations for the buffer's
        update. The memory is the same on all ranks, because what the ranks add is sorted by problem."""
        buffered = None
        buffer, replay = self.method.part(DemonstrationBuffer), self.method.part(Replay)
        if buffer is not None:
            pushed = [g.group.prompt for g in groups if g.decision.push_demonstration]
            mine = [prompt.problem.id for prompt in pushed if self.sampler.is_guided(prompt)]
            waiting = with_waiting(memory.waiting, sorted(self._gathered(mine)))
            if len(waiting) >= buffer.size:
                buffered = self._demonstrations(waiting[: buffer.size])
                waiting = waiting[buffer.size :]
            memory = replace(memory, waiting=waiting)
        if replay is not None:
            seen = sorted(self._gathered([_seen(g) for g in groups]))
            stored = remember(memory.replay, seen, replay.most_stored)
            is_open = memory.replay_open or solved >= replay.start
            memory = replace(memory, replay=stored, replay_open=is_open)
        return memory, buffered

    def _gathered(self, mine: list[Any]) -> list[Any]:
        """Join the lists of all ranks into one (a collective)."""
        return [part for parts in self.ranks.gather(mine) for part in parts]


def _seen(gated_group: GatedGroup) -> Any:
    """Return what the replay store needs: how many plain samples of the policy are correct in this group, and
    which of them are also finished."""
    group = gated_group.group
    triples = zip(group.rollouts, gated_group.view.solved, strict=True)
    own = [(r, solved) for r, solved in triples if r.member is Origin.POLICY and r.round.is_plain]
    right = [r for r, solved in own if solved and r.stop is Stop.STOP_TOKEN]
    num_solved, num_scored = sum(s is True for _, s in own), sum(s is not None for _, s in own)
    return seen_of(group.prompt.problem.id, num_solved, num_scored, right)
