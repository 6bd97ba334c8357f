"""Check that lm-evaluation-harness and truestep give the same tokens and answers for the same prompts.

    python benchmarks/lm_eval_agreement.py LM_EVAL_PYTHON DATA [--limit 20] [--benchmarks
        mawps,svamp,arc_challenge] [--prompt completion] [--few-shot 4] [--model FOLDER] [--label NAME] [--out
        results/lm-eval-agreement.json]

Sampling is greedy, in float32, with batch size 1. LM_EVAL_PYTHON is the Python of an environment with lm_eval
0.4.13 and torch; DATA is a folder with the benchmarks. lm-eval gets our rendered prompts as a separate task
(with our stops), so that only generation, cutting and extraction differ. Both texts go through our
extraction, and both token sequences are compared up to the cut. Prints every difference and one JSON line;
exits with 1 if less than 99 % agree. ``--out`` is written after each benchmark and keeps the entries of other
benchmarks (``--label`` distinguishes two runs of the same benchmark).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from truestep.evaluate.jobs import Job, evaluation_settings, make_jobs
from truestep.evaluate.model_adapters import TokenAdapter
from truestep.evaluate.prompts import cut
from truestep.grade.score import Grader, find_answer
from truestep.model.load import load_model, load_tokenizer, resolve
from truestep.pipeline.prepare import context_and_eos
from truestep.records import Verdict
from truestep.rollout.engine import SampleRequest, SamplingParameters
from truestep.rollout.engine_torch import TorchEngine
from truestep.rundir import provenance
from truestep.seeding import Purpose
from truestep.train.policy import Policy

MAX_NEW_TOKENS = 128
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {stops}, do_sample: false, max_gen_toks: {limit}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def theirs(python: str, model: str, job: Job, prompts: list[str], folder: Path) -> list[str]:
    """Return the output of lm-eval's hf backend for each prompt."""
    name, file = f"agreement_{job.benchmark.id}", folder / f"{job.benchmark.id}.jsonl"
    rows = [{"prompt": text, "answer": p.answer} for text, p in zip(prompts, job.problems, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stops = json.dumps(list(job.template.stop))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, stops=stops, limit=MAX_NEW_TOKENS))
    words = [
        python,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
    ]
    words += ["--device", "cpu", "--batch_size", "1", "--include_path", str(folder), "--tasks", name]
    words += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    subprocess.run(words, check=True, capture_output=True, env=environment)
    (samples,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
    found = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"]
    )
    return [row["resps"][0][0] for row in found]


def ours(job: Job, asked: Any, tokenizer: Any, engine: TorchEngine) -> list[str]:
    sampling = SamplingParameters(
        temperature=0, max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=asked.stop_token_ids,
        stop_sequences=asked.stop_sequences,
    )  # fmt: skip
    requests = [
        SampleRequest(problem_id=p.problem.id, sample_index=0, prompt_ids=p.token_ids, seed=0,
                      purpose=Purpose.EVALUATE, step=0)
        for p in asked.prompts
    ]  # fmt: skip
    found = {r.problem_id: r.completion_ids for r in engine.generate(requests, sampling)}
    texts = [str(tokenizer.decode(found[p.id], skip_special_tokens=True)) for p in job.problems]
    return [cut(text, job.template.stop) for text in texts]


def as_text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """Return the text that lm-eval gets; the tokenizer must turn it into exactly these ids again."""
    text = str(tokenizer.decode(ids))
    if tokenizer(text)["input_ids"] != list(ids):
        raise SystemExit(f"no text gives exactly these tokens: {text!r}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python")
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--benchmarks", default="mawps,svamp,arc_challenge")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompt", default="completion")
    parser.add_argument("--few-shot", type=int, default=4)
    parser.add_argument("--label", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    raw = {
        "model": {"path": args.model}, "benchmarks": args.benchmarks.split(","), "data": args.data,
        "prompts": [args.prompt], "limit": args.limit, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 0,
    }  # fmt: skip
    settings = evaluation_settings(raw, "the options")
    torch.set_num_threads(1)
    loaded = load_model(settings.model, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    engine = TorchEngine(Policy(loaded).model, max_running=1)  # the policy installs the packed attention
    tokenizer = load_tokenizer(settings.model)
    context, eos = context_and_eos(settings)
    adapter = TokenAdapter(
        tokenizer=tokenizer,
        context_length=context,
        model_eos=eos,
        open_engine=lambda: engine,
        pinned_limit=True,
    )
    results: dict[str, Any] = {}
    for job in make_jobs(settings, Path()):
        with tempfile.TemporaryDirectory() as folder:
            asked: Any = adapter.ready(job, args.few_shot)
            own = ours(job, asked, tokenizer, engine)
            prompts = [as_text(tokenizer, p.token_ids) for p in asked.prompts]
            foreign = theirs(args.python, resolve(settings.model), job, prompts, Path(folder))
            pairs = list(zip(own, foreign, strict=True))
        tokens = [tokenizer(a.rstrip())["input_ids"] == tokenizer(b.rstrip())["input_ids"] for a, b in pairs]
        found = [[find_answer(p, text) for text in pair] for p, pair in zip(job.problems, pairs, strict=True)]
        answers = [a.answer == b.answer for a, b in found]
        with Grader() as grader:
            scores = [
                grader.score_answers(list(zip(job.problems, own, strict=True)))
                for own in zip(*found, strict=True)
            ]
        differences = []
        for problem, (a, b), same in zip(job.problems, pairs, tokens, strict=True):
            if not same:
                differences.append({"id": problem.id, "ours": a, "theirs": b})
                print(f"{job.benchmark.id} {problem.id}\n  ours   {a!r}\n  theirs {b!r}", file=sys.stderr)
        results[job.benchmark.id] = {
            "n": len(pairs), "equal_tokens": sum(tokens), "equal_answers": sum(answers),
            "correct": [sum(score.verdict is Verdict.CORRECT for score in own) for own in scores],
        }  # fmt: skip
        if args.out:
            known = json.loads(args.out.read_text()) if args.out.exists() else {}
            known[f"{job.benchmark.id} {args.label}".strip()] = {
                **results[job.benchmark.id], "differences": differences, "model": args.model,
                "lm_eval": "0.4.13 hf", "prompt": args.prompt, "few_shot": args.few_shot,
                "max_new_tokens": MAX_NEW_TOKENS, "commit": provenance(0)["commit"],
            }  # fmt: skip
            args.out.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(results))
    worst = min(min(r["equal_tokens"], r["equal_answers"]) / r["n"] for r in results.values())
    sys.exit(worst < 0.99)


if __name__ == "__main__":
    main()
