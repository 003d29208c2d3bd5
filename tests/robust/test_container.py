"""As in a container: a user without a name or a home, who may write one volume and nothing else.

The real thing is a mount namespace in which all is read-only. Where none can be made, permissions do what they can.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from encoders import write_encoder

from tests.evaluation.conftest import write_data, write_head

ROOT = Path(__file__).parents[2]
# What is mounted where, then the command as another user: one who may read all, wherever the interpreter lies.
READ_ONLY = """
set -e
mount --bind "$0" /mnt
mount -t tmpfs tmpfs /mnt/vol
chmod 1777 /mnt/vol
mount -o remount,bind,ro /
mount -o remount,bind,ro /mnt
cd /mnt
"""
SHUT = 'set -e\ncd "$0"\nchmod -R go-w .\nchmod 1777 vol\n'
USER = "exec setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=-all,{0} --ambient-caps=-all,{0} env -i "
USER = USER.format("+dac_read_search")
RUN = f'PYTHONPATH={shlex.quote(str(ROOT))} OMP_NUM_THREADS=1 PATH="$PATH" {{}} sh -c "$1"\n'


def run(folder: Path, commands: list[str], namespace: bool, more: str = "") -> subprocess.CompletedProcess[str]:
    script = (READ_ONLY if namespace else SHUT) + USER + RUN.format(more)
    whole = ["unshare", "-m"] * namespace + ["sh", "-c", script, str(folder)]
    return subprocess.run([*whole, " && ".join(commands)], capture_output=True, text=True)


def possible(folder: Path, namespace: bool) -> None:
    command = f'{shlex.quote(sys.executable)} -c \'import mergebench; open("vol/new", "w")\''
    try:
        done = run(folder, [command, "rm vol/new"], namespace)
    except FileNotFoundError:
        pytest.skip("no unshare or setpriv on this machine")
    if os.geteuid() or done.returncode:
        pytest.skip(f"this takes root: {done.stderr.strip()}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base, tuned, labelled texts, a recipe that measures what it merges, and vol, to be written."""
    place = tmp_path / "work"
    for seed, name in enumerate(("base", "tuned")):
        write_encoder(place / name, seed=seed)
    write_data(place / "data.jsonl")
    write_head(place / "head")
    task = {"name": "a", "kind": "text-classification", "data": "data.jsonl", "head": "head/head.safetensors"}
    (place / "suite.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "tuned"}]}
    recipe["evaluate"] = {"suite": "suite.yaml", "baselines": ["linear"]}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (place / "vol").mkdir()
    return place


PROGRAM = f"{shlex.quote(sys.executable)} -m mergebench"
MERGE = f"{PROGRAM} merge recipe.yaml -q --out vol"
KEPT = "warning: results: no result is kept there: {} (--results DIR names another folder)\n"


def test_a_user_who_may_write_one_folder(folder: Path) -> None:
    possible(folder, namespace=False)
    ran = run(folder, [MERGE], namespace=False, more=f"TMPDIR={shlex.quote(str(folder / 'vol'))} HOME=/nonexistent")
    assert (ran.returncode, ran.stderr) == (0, KEPT.format("Permission denied"))
    found = {path.name for path in (folder / "vol").iterdir()}
    assert {"model.safetensors", "mergebench.json", "evaluation.json", "report.html"} <= found
    assert not [name for name in found if name.startswith(("mergebench-", "."))]
    assert {path.name for path in folder.iterdir()} == {
        "base", "data.jsonl", "head", "recipe.yaml", "suite.yaml", "tuned", "vol"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "HOME=/mnt", "TMPDIR=/mnt/vol/tmp"])
def test_a_read_only_container(folder: Path, more: str) -> None:
    """No folder for temporary files either, unless it is named."""
    possible(folder, namespace=True)
    commands = [
        "mkdir -p vol/tmp",
        f"{PROGRAM} merge recipe.yaml -q --out vol/merged",
        f"{PROGRAM} merge recipe.yaml -q --out vol/checked --no-eval --verify",
        f"{PROGRAM} eval suite.yaml vol/merged base -q --out vol/measured --results vol/results",
        f"{PROGRAM} report vol/merged",
        f"{PROGRAM} probe fit --model base --data data.jsonl --undesired bad -q --out vol/probe.safetensors",
        f"{PROGRAM} plan recipe.yaml",
        f"{PROGRAM} doctor ties -q",
        "ls -A vol/merged vol/results vol/tmp",
    ]
    ran = run(folder, commands, True, more)
    assert ran.returncode == 0, ran.stderr
    assert set(ran.stderr.splitlines()) == {KEPT.format("Read-only file system").strip()} | {
        KEPT.format("Permission denied").strip()
    }
    assert "hashes.json" in ran.stdout and "report.html" in ran.stdout


@pytest.mark.slow
def test_a_volume_that_is_the_result(folder: Path) -> None:
    possible(folder, namespace=True)
    ran = run(folder, [MERGE, "ls -A vol"], namespace=True)
    assert ran.returncode == 0, ran.stderr
    assert "report.html\n" in ran.stdout and ".partial" not in ran.stdout


NOWHERE = """
import sys, tempfile, mergebench.cli as program
def none(): raise FileNotFoundError
tempfile.gettempdir, program.MEMORY = none, "/nowhere"
sys.argv[1:] = ["methods"]
program.command()
"""


def test_nowhere_to_write_is_one_line() -> None:
    """Before anything is imported that would say it in its own words."""
    environment = os.environ | {"TMPDIR": "/nowhere"}
    ran = subprocess.run([sys.executable, "-c", NOWHERE], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        "error: no folder for temporary files may be written\nhint: set TMPDIR to one; docker run --tmpfs /tmp\n"
    )
