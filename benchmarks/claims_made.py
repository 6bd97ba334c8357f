"""The claims of docs/results/claims.md, in words, and the evidence on each. benchmarks/claims.py judges them."""

from __future__ import annotations

from collections.abc import Mapping

from claims import Audited, Claim, Contrast, Count, Equal, Evidence, Stages

COMPARISONS = tuple(
    f"comparison-{task}-{base}" for task in ("addition", "subtraction") for base in ("weak", "strong")
)
BESIDE = ("staircase", *COMPARISONS, "letters")  # studies in which mixed methods start from the base model


def across(studies: tuple[str, ...], a: str, b: str) -> tuple[Evidence, ...]:
    return tuple(Contrast(study=study, a=a, b=b) for study in studies)


def above(name: str, arm: str) -> Claim:
    """The paper's main claim, for one mixed-policy method."""
    return Claim(
        words=f"SFT, then RL, is better than {name} from the base model (Tables 1 and 4).",
        refuted_if=f"a study in which {name} has the higher score",
        evidence=across(BESIDE, "sft-rl", arm),
    )


def on_top(name: str, arm: str) -> Claim:
    """The paper's open question, for one mixed-policy method."""
    return Claim(
        words=f"From the repaired SFT model, {name} is better than RL (left open: such methods might yield further gains).",
        refuted_if="RL has the higher score",
        evidence=across(("open",), arm, "sft-rl"),
    )


PAPER = (
    above("LUFFY", "luffy"),
    above("ReLIFT", "relift"),
    above("SRFT", "srft"),
    above("Prefix-RFT", "prefix-rft"),
    above("HPT", "hpt"),
    Claim(
        words="The two faults lower the score of SFT (Table 2).",
        refuted_if="SFT with both faults has the higher score",
        evidence=across(("staircase",), "sft", "both-faults"),
    ),
    Claim(
        words="Repairing only the optimizer's offload raises the score of the faulty SFT (Table 2: +5.1 points).",
        refuted_if="the score falls",
        evidence=across(("staircase",), "offload-repaired", "both-faults"),
    ),
    Claim(
        words="Repairing only the aggregation of the loss raises the score of the faulty SFT (Table 2: +0.8 points).",
        refuted_if="the score falls",
        evidence=across(("staircase",), "aggregation-repaired", "both-faults"),
    ),
    Claim(
        words="The faults reverse the ranking: mixed-policy methods seemed better only because SFT was faulty.",
        refuted_if="LUFFY or HPT is below RL from the faulty SFT, or above RL from the repaired SFT",
        evidence=(
            Contrast(study="staircase", a="luffy", b="both-faults-rl"),
            Contrast(study="staircase", a="sft-rl", b="luffy"),
            Contrast(study="staircase", a="hpt", b="both-faults-rl"),
            Contrast(study="staircase", a="sft-rl", b="hpt"),
        ),
    ),
    Claim(
        words="RL improves the SFT model (Tables 1 and 4).",
        refuted_if="a study in which SFT without RL has the higher score",
        evidence=(
            *across(("demo", *COMPARISONS, "letters"), "sft-rl", "sft"),
            Stages(run="smollm2-gsm8k", earlier="sft", later="rl"),
        ),
    ),
    Claim(
        words="A full RL stage is better than a truncated one (Tables 1 and 5).",
        refuted_if="a study in which the truncated stage has the higher score",
        evidence=across(COMPARISONS, "sft-rl", "sft-rl-short"),
    ),
    on_top("LUFFY", "sft-luffy"),
    on_top("HPT", "sft-hpt"),
    on_top("Prefix-RFT", "sft-prefix-rft"),
    Claim(
        words="DeepSpeed 0.18.9 with ZeRO-2 and an offloaded optimizer passes on only the first micro-batch (section 2.1).",
        refuted_if="more than the first micro-batch reaches the optimizer",
        evidence=(
            Audited(
                release="deepspeed-0.18.9",
                having={"stage": 2, "offload": True, "processes": 1},
                fault="only the first micro-batch",
            ),
        ),
    ),
    Claim(
        words="DeepSpeed 0.18.9 with ZeRO-2 and an offloaded optimizer drops the intermediate micro-batches (abstract).",
        refuted_if="they reach the optimizer",
        evidence=tuple(
            Audited(
                release="deepspeed-0.18.9",
                having={"stage": 2, "offload": True, "processes": n},
                fault="the intermediate micro-batches are dropped",
            )
            for n in (1, 2)
        ),
    ),
    Claim(
        words="ZeRO-1 with an offloaded optimizer is affected as well (section 2.1).",
        refuted_if="its step is right",
        evidence=(
            Audited(
                release="deepspeed-0.18.9",
                having={"stage": 1, "offload": True, "processes": 1},
                fault="micro-batches are dropped",
            ),
        ),
    ),
    Claim(
        words="ZeRO-3, and ZeRO-2 without offload, are not affected.",
        refuted_if="one of their steps is wrong",
        evidence=(
            Audited(
                release="deepspeed-0.18.9", having={"stage": 3, "offload": True, "processes": 1}, fault=""
            ),
            Audited(
                release="deepspeed-0.18.9", having={"stage": 2, "offload": False, "processes": 1}, fault=""
            ),
        ),
    ),
    Claim(
        words="The offload fault came with DeepSpeed 0.15.2 and went with 0.19.0.",
        refuted_if="another first or last release with the fault",
        evidence=(
            Equal(file="audit-bisect/deepspeed.json", values={"first_bad": "0.15.2", "after": "0.19.0"}),
        ),
    ),
    Claim(
        words="OpenRLHF 0.10.2 uses the mean of micro-batch means; 0.11.2 does not.",
        refuted_if="the older release is right, or the later one is not",
        evidence=(
            Audited(
                release="openrlhf-0.10.2",
                having={"offload": False, "processes": 1},
                fault="mean of micro-batch means",
            ),
            Audited(release="openrlhf-0.11.2", having={"offload": False, "processes": 1}, fault=""),
        ),
    ),
    Claim(
        words="The loss of verl 0.6.0 uses the mean of micro-batch means; that of 0.9.1 does not.",
        refuted_if="the older release is right, or the later one is not",
        evidence=(
            Audited(release="verl-0.6.0", having={"processes": 1}, fault="mean of micro-batch means"),
            Audited(release="verl-0.9.1", having={"processes": 1}, fault=""),
        ),
    ),
    Claim(
        words="LLaMA-Factory uses the mean of micro-batch means. (Tested: release 0.9.5.)",
        refuted_if="it divides by the tokens of the whole step",
        evidence=(
            Audited(
                release="llamafactory-0.9.5",
                having={"arch": "llama", "processes": 1},
                fault="mean of micro-batch means",
            ),
        ),
    ),
    Claim(
        words="With Qwen2.5-Math-7B, SFT, then RL, reaches 57.0, 3.8 points above the best mixed-policy method; with "
        "Llama-3.1-8B it reaches 43.7, 22.2 points above.",
        refuted_if="other scores with the same recipe",
        why="the paper used 16 GPUs; recipes/paper/ has the recipes",
    ),
    Claim(
        words="50 RL steps are enough to be above the mixed-policy methods, with fewer FLOPs (Tables 5 and 6).",
        refuted_if="a mixed-policy method has the higher score at these FLOPs",
        why="a claim about 7 B parameters; no study here declared a contrast of the truncated stage with a mixed-policy method",
    ),
    Claim(
        words="RL shortens the answers of the SFT model (5,000 to 3,700 tokens), and mixed-policy training lengthens them.",
        refuted_if="answers change the other way",
        why="the answers of the studies' tasks have a fixed form, so their length says little",
    ),
)

FIELD = (
    Claim(
        words="RL adds more than SFT continued for the same FLOPs.",
        refuted_if="a study in which continued SFT has the higher score",
        evidence=across(("demo", *COMPARISONS, "letters", "open"), "sft-rl", "sft-continued"),
    ),
    Claim(
        words="RL is better than SFT on the model's own correct samples (rejection sampling).",
        refuted_if="a study in which rejection sampling has the higher score",
        evidence=across(("demo", *COMPARISONS, "letters"), "sft-rl", "sft-rejection"),
    ),
    Claim(
        words="What RL adds comes from the reward: RL with a random reward is worse.",
        refuted_if="a study in which the random reward has the higher score",
        evidence=across((*COMPARISONS, "letters", "open"), "sft-rl", "random-reward"),
    ),
    Claim(
        words="RL needs SFT before it: RL from the base model is worse.",
        refuted_if="a study in which RL from the base model has the higher score",
        evidence=across((*COMPARISONS, "letters"), "sft-rl", "rl-from-base"),
    ),
    Claim(
        words="SFT, then RL, is better than CHORD-μ from the base model.",
        refuted_if="a study in which CHORD-μ has the higher score",
        evidence=across(COMPARISONS, "sft-rl", "chord-mu"),
    ),
    Claim(
        words="SFT, then RL, is better than one loss with both parts (RL with SFT loss) from the base model.",
        refuted_if="a study in which the joint loss has the higher score",
        evidence=across(COMPARISONS, "sft-rl", "multi-task"),
    ),
    Claim(
        words="SFT, then RL, is better than UFT from the base model.",
        refuted_if="a study in which UFT has the higher score",
        evidence=across(COMPARISONS, "sft-rl", "uft"),
    ),
    Claim(
        words="SFT, then RL, is better than RL-PLUS from the base model.",
        refuted_if="a study in which RL-PLUS has the higher score",
        evidence=across(COMPARISONS, "sft-rl", "rl-plus"),
    ),
    Claim(
        words="RL extends what a model can solve at all (pass@k at a large k).",
        refuted_if="the base model's pass@k is as high at a large k",
        why="no study here samples enough answers per problem",
    ),
)

OWN = (
    Claim(
        words="The audit finds and names every fault of the mutants of a trainer.",
        refuted_if="a mutant that is not named",
        evidence=tuple(
            Count(
                file=f"audit-mutants/{dtype}.json", trials="mutants", successes="named", what="not named"
            )
            for dtype in ("float32", "bfloat16")
        ),
    ),
    Claim(
        words="The audit accuses no right trainer.",
        refuted_if="a right trainer that is accused",
        evidence=(
            Count(file="audit-mutants/float32.json", trials="clean", failures="accused", what="accused"),
            Count(file="audit-mutants/bfloat16.json", trials="clean", failures="accused", what="accused"),
            Count(file="audit-clean/clean.json", trials="runs", failures="accused", what="accused"),
        ),
    ),
    Claim(
        words="The guard of a running training gives no false alarm, and does not change a bit of the update.",
        refuted_if="an alarm in a right run, or other bits",
        evidence=(
            Count(
                file="guard_frameworks.json", trials="clean_steps", failures="false_alarms",
                what="steps with a false alarm",
            ),
            Count(
                file="guard_frameworks.json", trials="loops", failures="other_bits",
                what="loops with other bits",
            ),
            Count(file="guard_noise.json", trials="runs", failures="wrong", what="runs with a wrong verdict"),
        ),
    ),
    Claim(
        words="The guard finds every fault in the training loops of other frameworks.",
        refuted_if="a loop with a fault that is missed",
        evidence=(
            Count(file="guard_frameworks.json", trials="loops", failures="missed", what="loops with a missed fault"),
        ),
    ),
    Claim(
        words="The test of fresh weights in the engine of RL gives no false alarm.",
        refuted_if="an alarm after an update that the engine got",
        evidence=(
            Count(file="engine_proof.json", trials="publishes", failures="false_alarms", what="false alarms"),
        ),
    ),
)  # fmt: skip

GROUPS: Mapping[str, tuple[Claim, ...]] = {
    "The paper (arXiv:2604.23747)": PAPER,
    "The field": FIELD,
    "This project": OWN,
}
