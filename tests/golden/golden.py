"""Golden runs: record the bytes and the values of every step of some tiny runs, and compare them later.

    python tests/golden/golden.py record [--src SRC]       write or extend golden.json; needs a clean tree
    python tests/golden/golden.py compare [--src SRC]      compare the tree with golden.json
    python tests/golden/golden.py compare-demo BASE HEAD   compare a shortened demo of two trees, bit for bit

SRC is the ``src`` folder of any commit. The runs are started by the command line, and their results are read
from the files that it writes, so that the comparison does not depend on how the package is built inside.

For every step, on one thread, it compares the SHA-256 of the parameters' bytes, the norm of the parameters,
and every metric. Bytes are the same only on one kind of machine, so they are stored by instruction set and
torch version. On a machine without an entry only the values are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
RECORDED = HERE.with_name("golden.json")
SRC = HERE.parents[2] / "src"
DEMO = HERE.parents[2] / "recipes/demo.toml"
# Relative. RoPE's sines are float32: without x86 vector kernels their last digit differs (measured: up to 6e-6).
TOLERANCE, TOLERANCE_ELSEWHERE = 1e-6, 1e-4
VECTOR_KERNELS = ("AVX2", "AVX512")
FLOOR = 1e-9  # absolute: differences of float64 log-probabilities that are zero except for rounding

# Renamed metrics: recorded key → current key.
RENAMED: dict[str, str] = {}
# Values that were recorded wrongly and are not compared: "RUN/KEY" (RUN may be *) → the reason.
MOVED: dict[str, str] = {
    f"{run}/clip_ratio/{side}": why
    for run, why in (
        ("reference", "the zeros of the KL term were counted as clipped tokens"),
        ("demonstration", "a surrogate without a clip has no clipped tokens"),
        ("switch", "a surrogate without a clip has no clipped tokens"),
        ("replay", "a surrogate without a clip has no clipped tokens"),
        ("buffer", "a surrogate without a clip has no clipped tokens"),
    )
    for side in ("low", "high")
} | {"*/publish/probe_difference": "fingerprints replaced the probe"}

# float64, so that rounding does not decide a sampled token or a value at 1e-6; two runs use the other dtypes.
HEAD = """
name = "golden"
[model]
path = "{path}"
tiny = {{ hidden_size = 32, num_layers = 2, num_heads = 2, intermediate_size = 64 }}
[compute]
threads = 1
dtype = "{dtype}"
[data.train]
source = "train.jsonl"
[[stages]]
data = "train"
save_every = 1
keep_checkpoints = 100
tokens_per_microbatch = 60
"""
SFT = """kind = "sft"
steps = {steps}
sequences_per_step = 8
{method}
method_options = {options}
optimizer = {{ lr = {lr}, eps = {eps}, schedule = "cosine", warmup_fraction = 0.2 }}
"""
RL = """kind = "rl"
steps = {steps}
prompts_per_step = 4
samples_per_prompt = 4
updates_per_rollout = {updates}
{method}
method_options = {options}
optimizer = {{ lr = {lr}, eps = {eps} }}
sampling = {{ max_new_tokens = 4, max_running = 6 }}
"""
REJECTION = """kind = "rejection"
steps = {steps}
samples_per_prompt = 6
keep_per_prompt = 2
sequences_per_step = 6
optimizer = {{ lr = {lr}, eps = {eps} }}
sampling = {{ max_new_tokens = 4, max_running = 6 }}
"""


def _run(
    method: str, options: str = "", *, stage: str = RL, dtype: str = "float64", **given: Any
) -> tuple[str, str]:
    # A large eps: with the default, AdamW turns the last digit of a small gradient into a whole step.
    values = {"steps": 3, "updates": 2, "lr": 5e-3, "eps": 1e-3 if dtype == "float64" else 1e-8, **given}
    # The default method of an RL stage has been renamed since the recording, so it is not named here.
    named = f'method = "{method}"' if method else ""
    return stage.format(method=named, options="{" + options + "}", **values), dtype


# "start" comes first: the other runs start from the model that it exports, which solves some of the problems.
RUNS: dict[str, tuple[str, str]] = {
    "start": _run("sft", stage=SFT, steps=14, lr=2e-2),
    "sft": _run("dft", stage=SFT),
    "sft-float32": _run("sft", stage=SFT, dtype="float32"),
    "several-updates": _run("psft", stage=SFT),
    "rl": _run("", "entropy_bonus = 0.01", steps=4),
    "rl-bfloat16": _run("", dtype="bfloat16"),
    "reference": _run("grpo", 'kl = "k3", kl_coef = 0.04'),
    "refill": _run("dapo", "overlong_fraction = 0.75"),
    "demonstration": _run("luffy"),
    "switch": _run("hpt"),
    "stream": _run("chord_mu", updates=1),
    "prefix": _run("prefix_rft"),
    "branch": _run("bread"),
    "hint": _run("ghpo"),
    "replay": _run("exgrpo", "replay_start = 0.0", steps=4),
    "buffer": _run("relift", "buffer_size = 1, buffer_lr = 1e-3", steps=4),
    "controller": _run("super_rl", "learned_weights = true, sigma_rate = 0.1"),
    "rejection": _run("", stage=REJECTION),
}
# In these dtypes a different order of a sum changes the values, so they cannot be compared across machines.
COARSE = ("sft-float32", "rl-bfloat16")


# -------------------------------------------------------------------------------------------- one tree's runs


def run_tree(src: Path, folder: Path, runs: Iterable[str] = RUNS) -> dict[str, list[dict[str, Any]]]:
    """Runs the named runs of the tree in ``src``, all in one child process; their steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"q{i}", "problem": f"{i}+{i * 7 % 4}", "answer": str(i * 7 % 2), "checker": "exact",
         "solution": f"{i % 2}" + f"{i % 3}" * (i % 2)}
        for i in range(12)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = ["start", *[name for name in runs if name != "start"]]
    for name in wanted:
        stage, dtype = RUNS[name]
        path = "tiny" if name == "start" else "start/stages/01-sft/export"
        (folder / f"{name}.toml").write_text(HEAD.format(path=path, dtype=dtype) + stage)
    run_commands(src, folder, [["run", f"{name}.toml", "--out", name] for name in wanted])
    return {name: steps_of(folder / name) for name in wanted}


def run_commands(src: Path, folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Runs ``truestep`` with each list of words, in one process of the tree in ``src``, on one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join([str(src.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **threads, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    child = [sys.executable, str(HERE), "child", str(src.resolve()), json.dumps([list(c) for c in commands])]
    done = subprocess.run(child, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{src}: {' '.join(done.args[-1:])}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _child(src: str, commands: Sequence[Sequence[str]]) -> None:
    import torch

    import truestep
    from truestep.cli.main import main

    if not Path(truestep.__file__).is_relative_to(src):
        raise SystemExit(f"truestep was imported from {truestep.__file__}, not from {src}")
    with contextlib.suppress(
        ImportError, AttributeError
    ):  # drawing a page takes longer than the run, and gives no number
        from truestep.report import html

        html.write_report = lambda run: run
    for words in commands:
        sys.argv = ["truestep", *words]
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
        require_one_thread(torch.get_num_threads(), " ".join(words))


def require_one_thread(count: int, command: str) -> None:
    if count != 1:
        raise SystemExit(f"truestep {command}: ran on {count} threads; set compute.threads = 1")


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The results of every step of a run's stages, in order; a stage's last entry is its exported model."""
    found = []
    for stage in sorted((run / "stages").iterdir()):
        for line in (stage / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            step = row.pop("step")
            (path,) = (stage / "checkpoints" / f"step_{step:08d}").glob("parameters.*.safetensors")
            values = {key.partition("/")[2]: value for key, value in row.items()}
            found.append({"at": f"{stage.name} step {step}", **_parameters(path), "values": values})
        exported = _parameters(stage / "export/model.safetensors")
        found.append({"at": f"{stage.name} export", **exported, "values": {}})
    return found


def _parameters(path: Path) -> dict[str, Any]:
    """The SHA-256 of the tensors in a safetensors file, independent of their order there, and their norm."""
    import safetensors.torch
    import torch

    tensors = safetensors.torch.load_file(path)
    digest, squares = hashlib.sha256(), 0.0
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name.removeprefix('model.')} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        squares += float(tensor.double().square().sum())
    return {"sha256": digest.hexdigest()[:32], "norm": math.sqrt(squares)}


def instruction_set() -> str:
    """What the bytes depend on: kernels differ with vendor, widest instructions and release of torch."""
    import torch

    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    flags = set((re.findall(r"^(?:flags|Features)\s*: (.*)$", info, re.M) or [""])[0].split())
    vendor = (re.findall(r"^vendor_id\s*: (\S+)", info, re.M) or ["unknown"])[0]
    special = [
        f
        for f in ("fma", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "bf16", "sve")
        if f in flags
    ]
    forced = [
        f"{k}={os.environ[k]}"
        for k in ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
        if k in os.environ
    ]
    return " ".join(
        [vendor, torch.backends.cpu.get_cpu_capability(), *special, *forced, f"torch-{torch.__version__}"]
    )


# -------------------------------------------------------------------------------------------------- comparing


def differences(
    recorded: Mapping[str, Any], now: Mapping[str, Any], hashes: bool, tolerance: float = TOLERANCE
) -> list[str]:
    """One line for each difference from the record. Values are compared even if the bytes are the same."""
    found = []
    for run, steps in recorded.items():
        if run not in now:
            found.append(f"{run}: is not among the runs")
        elif len(steps) != len(now[run]):
            found.append(f"{run}: {len(now[run])} entries instead of {len(steps)}")
        elif hashes or run not in COARSE:
            for old, new in zip(steps, now[run], strict=True):
                found += [f"{run}: {text}" for text in _step_differences(run, old, new, hashes, tolerance)]
    return found


def _step_differences(
    run: str, old: Mapping[str, Any], new: Mapping[str, Any], hashes: bool, tolerance: float
) -> list[str]:
    where = old["at"]
    found = [f"{where}: different bytes"] if hashes and old["sha256"] != new["sha256"] else []
    values = {"parameter norm": old["norm"], **{RENAMED.get(k, k): v for k, v in old["values"].items()}}
    current = {"parameter norm": new["norm"], **new["values"]}
    for key, value in values.items():
        if f"{run}/{key}" in MOVED or f"*/{key}" in MOVED:
            continue
        if key not in current:
            found.append(f"{where}: {key} is missing (add a renamed metric to RENAMED)")
        elif not math.isclose(value, current[key], rel_tol=tolerance, abs_tol=FLOOR if tolerance else 0.0):
            found.append(f"{where}: {key} is {current[key]!r}, was {value!r}")
    return found


# --------------------------------------------------------------------------------------------------- commands


def _git(src: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(src), *words], check=True, capture_output=True, text=True).stdout


def require_clean(src: Path) -> None:
    """Raises SystemExit if anything except the record is uncommitted: no commit would name the code."""
    changed = _git(src, "status", "--porcelain").splitlines()
    changed = [line for line in changed if not line.endswith(f"golden/{RECORDED.name}")]
    if changed:
        raise SystemExit(
            f"{src}: {changed[0].strip()} is not committed ({len(changed)} changes); commit first"
        )


def record(src: Path) -> None:
    """Record the tree's runs. If commit and runs are the recorded ones, only this instruction set is added."""
    require_clean(src)
    with tempfile.TemporaryDirectory() as folder:
        now = run_tree(src, Path(folder))
    hashes = {run: [step["sha256"] for step in steps] for run, steps in now.items()}
    values = {
        run: [{k: v for k, v in step.items() if k != "sha256"} for step in steps]
        for run, steps in now.items()
    }
    commit = _git(src, "rev-parse", "HEAD").strip()
    old = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    recipes = hashlib.sha256(json.dumps([HEAD, RUNS]).encode()).hexdigest()[:16]
    if (old.get("commit"), old.get("recipes")) != (commit, recipes):
        old = {
            "commit": commit,
            "recipes": recipes,
            "recorded on": instruction_set(),
            "values": values,
            "sha256": {},
        }
    old["sha256"][instruction_set()] = hashes
    RECORDED.write_text(json.dumps(old, indent=1) + "\n")
    print(f"wrote {RECORDED}: {commit[:7]}, {sum(map(len, now.values()))} entries in {len(now)} runs")


def read_record() -> tuple[dict[str, Any], bool, float]:
    """The recorded runs, whether they have hashes for this machine, and the tolerance of their values."""
    import torch

    stored = json.loads(RECORDED.read_text())
    hashes = stored["sha256"].get(instruction_set())
    runs = {
        run: [step | {"sha256": hashes[run][i] if hashes else ""} for i, step in enumerate(steps)]
        for run, steps in stored["values"].items()
    }
    vectors = torch.backends.cpu.get_cpu_capability() in VECTOR_KERNELS
    return runs, hashes is not None, TOLERANCE if vectors else TOLERANCE_ELSEWHERE


def compare_demo(base: Path, head: Path, sets: Sequence[str]) -> list[str]:
    """The differences, bit for bit, if both trees run the demo recipe with the same few steps on one thread."""
    recipe, found = DEMO.read_text(), {}
    overrides = [word for item in ("compute.threads=1", *sets) for word in ("--set", item)]
    for name, src in (("base", base), ("head", head)):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "demo.toml").write_text(recipe)
            run_commands(src, Path(folder), [["run", "demo.toml", "--out", "demo", *overrides]])
            found[name] = {"demo": steps_of(Path(folder) / "demo")}
            summary = json.loads((Path(folder) / "demo/summary.json").read_text())
            scores = {f"{row['checkpoint']}/{row['data']}": row["score"] for row in summary["scores"]}
            rewards = [v for step in found[name]["demo"] for k, v in step["values"].items() if k == "reward"]
            print(f"{name}: {len(found[name]['demo'])} entries, rewards {rewards}, scores {scores}")
            found[name]["demo"].append({"at": "evaluation", "sha256": "", "norm": 0.0, "values": scores})
    return differences(found["base"], found["head"], True, tolerance=0.0)


# Sums of one-digit numbers, so that after a few steps of SFT there is something left for RL to learn.
SHORT = (
    "data.demonstrations.options={ digits = 1 }", "data.demonstrations.limit=40",
    "data.problems.options={ digits = 1 }", "data.problems.skip=0", "data.problems.limit=40",
    "data.test.options={ digits = 1 }", "data.test.limit=10",
    "stages.sft.steps=60", "stages.sft.save_every=1", "stages.sft.keep_checkpoints=100",
    "stages.rl.steps=4", "stages.rl.save_every=1", "stages.rl.keep_checkpoints=100",
    "stages.rl.prompts_per_step=8",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "compare"):
        commands.add_parser(name).add_argument("--src", type=Path, default=SRC)
    demo = commands.add_parser("compare-demo")
    demo.add_argument("base", type=Path, help="a src folder")
    demo.add_argument("head", type=Path, help="a src folder")
    demo.add_argument(
        "--set", action="append", dest="sets", default=[], help="an additional override of the recipe"
    )
    child = commands.add_parser("child")
    child.add_argument("src")
    child.add_argument("words")
    given = parser.parse_args()
    if given.command == "child":
        _child(given.src, json.loads(given.words))
        return
    if given.command == "record":
        record(given.src)
        return
    if given.command == "compare":
        recorded, hashes, tolerance = read_record()
        with tempfile.TemporaryDirectory() as folder:
            found = differences(recorded, run_tree(given.src, Path(folder)), hashes, tolerance)
        print(
            "bytes and values" if hashes else f"values only; no hashes are recorded for {instruction_set()}"
        )
    else:
        found = compare_demo(given.base, given.head, [*SHORT, *given.sets])
    print("\n".join(found) or "the same")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
