"""Check the wheel and the source archive that ``python -m build`` made, and use the wheel from an empty environment.

    python benchmarks/package.py FOLDER [--extra train]

The exit code is 1 if something is missing or superfluous, or if a command of the installed package fails. With ``--extra train``,
torch and transformers are installed too, and a recipe is checked (minutes).
Held by: tests/unit/test_package.py
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_WHEEL, LARGEST_ARCHIVE = 5 << 18, 2 << 20  # bytes
# Folders and files at the top of the source archive. Tests and results are only in the repository: they read each other.
ARCHIVE = {
    "src",
    "docs",
    "recipes",
    "constraints",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "pyproject.toml",
}
ARCHIVE_ADDED = {"PKG-INFO", ".gitignore"}
PAIRS = '{"gold": "1/2", "pred": "The answer is \\\\boxed{0.5}"}\n{"gold": "3", "pred": "4"}\n'


def wheel_faults(names: Iterable[str], sources: Iterable[str]) -> list[str]:
    """How the files of a wheel differ from the package's files. Both are paths such as truestep/py.typed."""
    found = {name for name in names if ".dist-info/" not in name}
    wanted = {
        name for name in sources if not re.search(r"truestep/testing/(\w*mutant\w*|rl_trainer)\.py$", name)
    }
    return [f"the wheel lacks {n}" for n in sorted(wanted - found)] + [
        f"the wheel has {n}, which is not a file of the package" for n in sorted(found - wanted)
    ]


def archive_faults(names: Iterable[str]) -> list[str]:
    """What is missing or superfluous at the top of the source archive. ``names`` are paths such as truestep-0.1.0/src/…"""
    found = {name.split("/")[1] for name in names if "/" in name}
    return [f"the archive lacks {n}" for n in sorted(ARCHIVE - found)] + [
        f"the archive has {n}" for n in sorted(found - ARCHIVE - ARCHIVE_ADDED)
    ]


def metadata_faults(metadata: bytes) -> list[str]:
    """What the metadata of a wheel lacks, and links in its description that lead nowhere on a package index."""
    message = message_from_bytes(metadata)
    faults = [
        f"the metadata lacks {field}"
        for field in (
            "Name",
            "Version",
            "Summary",
            "License-Expression",
            "License-File",
            "Requires-Python",
            "Author",
            "Keywords",
        )
        if not message[field]
    ]
    classifiers = message.get_all("Classifier") or []
    if "Typing :: Typed" not in classifiers:
        faults.append("the metadata lacks the classifier Typing :: Typed")
    description = str(message.get_payload())
    if len(description) < 1000:
        faults.append("the metadata lacks the README")
    relative = re.findall(r"\]\((?!https?://)([^)]*)\)", description)
    return faults + [f"the description links to {target}" for target in relative]


def size_fault(path: Path, largest: int) -> list[str]:
    size = path.stat().st_size
    return [f"{path.name} has {size:,} bytes, more than {largest:,}"] if size > largest else []


def file_faults(folder: Path) -> Iterator[str]:
    """All faults of the one wheel and the one source archive in ``folder``."""
    [wheel], [archive] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    listed = subprocess.run(
        ["git", "ls-files", "src/truestep"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    with zipfile.ZipFile(wheel) as opened:
        yield from wheel_faults(opened.namelist(), [n.removeprefix("src/") for n in listed.split()])
        [metadata] = [n for n in opened.namelist() if n.endswith(".dist-info/METADATA")]
        yield from metadata_faults(opened.read(metadata))
    with tarfile.open(archive) as opened:
        yield from archive_faults(opened.getnames())
    yield from size_fault(wheel, LARGEST_WHEEL)
    yield from size_fault(archive, LARGEST_ARCHIVE)


def commands(extra: str) -> Iterator[tuple[list[str], int, str]]:
    """Arguments of truestep, the exit code, and a text of the output, for an environment with this extra."""
    yield ["--version"], 0, "truestep "
    yield ["--help"], 0, "Commands:"
    yield ["settings", "optimizer.lr"], 0, "lr"
    yield ["eval", "list"], 0, "gsm8k"
    yield ["eval", "grade", "pairs.jsonl", "--json"], 0, '"correct": 1'
    yield ["audit", "--past", "requirements.txt"], 4, "deepspeed"
    if extra == "train":
        yield ["audit", "--dry-run"], 0, "truestep"
        yield ["run", str(ROOT / "recipes/demo.toml"), "--dry-run"], 0, ""
    else:
        yield ["run", str(ROOT / "recipes/demo.toml"), "--dry-run"], 3, 'pip install "truestep[train]"'


def used(wheel: Path, extra: str) -> Iterator[str]:
    """Install the wheel into an empty environment and run commands there, in an empty folder. Yields what failed."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        venv.create(place / "venv", with_pip=True)
        python, what = (
            place / "venv/bin/python",
            f"{wheel.resolve()}[{extra}]" if extra else str(wheel.resolve()),
        )
        install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            ROOT / "constraints/cpu.txt",
        ]
        subprocess.run([python, *install, what], check=True)
        (place / "pairs.jsonl").write_text(PAIRS)
        (place / "requirements.txt").write_text("deepspeed==0.18.9\n")
        for arguments, code, text in commands(extra):
            done = subprocess.run(
                [place / "venv/bin/truestep", *arguments],
                cwd=place,
                capture_output=True,
                text=True,
                timeout=600,
            )
            print(f"truestep {' '.join(arguments)}: exit code {done.returncode}")
            if done.returncode != code or text not in done.stdout + done.stderr:
                yield f"truestep {' '.join(arguments)}: exit code {done.returncode}, not {code}:\n{done.stdout}{done.stderr}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extra", default="", choices=("", "train"))
    given = parser.parse_args()
    faults = list(file_faults(given.folder))
    [wheel] = given.folder.glob("*.whl")
    faults += used(wheel, given.extra)
    sizes = {path.name: path.stat().st_size for path in sorted(given.folder.iterdir())}
    print("\n".join(faults) or json.dumps(sizes))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
