"""Lock files and lists of packages as real tools write them, alone or in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from past_folders import freeze, look_back, offload

OTHERS = "".join(f'[[package]]\nname = "p{i}"\nversion = "1.{i}"\n' for i in range(10))
FILES = {
    "requirements.txt": "torch==2.6.0\ndeepspeed[hf]==0.18.9 ; python_version < '4' \\\n    --hash=sha256:aa\n",
    "requirements.in": "deepspeed == 0.18.9\n",
    "uv.lock": 'version = 1\n[[package]]\nname = "deepspeed"\nversion = "0.18.9"\nsource = { registry = "x" }\n',
    "gpu.lock": '[[package]]\nname = "deepspeed"\nversion = "0.18.9"\n',
    "poetry.lock": '[[package]]\nname = "deepspeed"\nversion = "0.18.9"\noptional = false\n',
    "pdm.lock": '[[package]]\nname = "DeepSpeed"\nversion = "0.18.9"\n',
    "pylock.toml": 'lock-version = "1.0"\n[[packages]]\nname = "deepspeed"\nversion = "0.18.9"\n',
    "Pipfile.lock": json.dumps(
        {"_meta": {}, "default": {"deepspeed": {"version": "==0.18.9"}}, "develop": {}}
    ),
    "environment.yml": "name: x\ndependencies:\n  - python=3.11\n  - pip:\n      - deepspeed==0.18.9\n",
    "conda.txt": "# packages in environment at /opt/x:\n#\n# Name   Version  Build  Channel\n"
    "pytorch   2.6.0   py311_0   pytorch\ndeepspeed   0.18.9   pypi_0   pypi\n",
    "explicit.txt": "# conda list --export\ndeepspeed=0.18.9=py311_0\n",
    "list.txt": "Package    Version\n---------- -------\ndeepspeed  0.18.9\ntorch      2.6.0+cu124\n",
    "Dockerfile": "FROM x\nRUN pip install torch==2.6.0 \\\n    'deepspeed==0.18.9' && rm -rf /tmp/x\n",
    "Dockerfile.gpu": 'RUN uv pip install --system "deepspeed==0.18.9"\n',
    "setup.sh": "set -e\npip3 install -U deepspeed==0.18.9 trl\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_pinned_version_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    for given in [path] if name in ("requirements.in", "gpu.lock") else [path, tmp_path]:
        found = offload(given)
        assert found.answer == "affected if", found.reasons
        assert any(f"deepspeed 0.18.9 was measured: faulty ({name})" in reason for reason in found.reasons)
    path.write_text(FILES[name].replace("0.18.9", "0.19.8"))
    assert offload(path).answer == "not affected"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("uv.lock", '[[package]]\nname = "torch"\nversion = "2.6.0"\n' + OTHERS),
        ("freeze.txt", freeze()),
        (
            "conda.txt",
            "# packages in environment at x:\npytorch 2.6.0 b\n" + "".join(f"p{i} 1 b\n" for i in range(10)),
        ),
    ],
)
def test_a_whole_environment_without_a_package_is_not_affected(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = look_back(tmp_path / name)
    assert {a.answer for a in found} == {"not affected"}
    assert f"packages in {name}" in found[0].reasons[0]


@pytest.mark.parametrize(
    "text",
    [
        "torch==2.6.0\ntrl==1.16.0\n",  # too few for a whole environment
        freeze("flash-attn>=2"),  # one package is not pinned
        freeze("deepspeed @ git+https://example.org/x"),  # installed, in an unknown version
        "deepspeed 0.18.9\n",  # two words, not a list of packages
        "# deepspeed==0.18.9\n",
        "pip install deepspeed\necho deepspeed==0.18.9 is old\n",
    ],
)
def test_what_pins_nothing_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    assert offload(tmp_path / "list.txt").answer == "unknown"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"default": [1], "develop": {"deepspeed": 3}}', "x = ", "package = 1"]
)
def test_a_broken_lock_file_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "Pipfile.lock").write_text(text)
    assert offload(tmp_path / "Pipfile.lock").answer == "unknown"
