"""Patches a model again and again in forked processes, and kills each at a random moment.

``python kill_patch.py SOURCE TARGET_FOLDER KILLS``: prints a JSON summary, or fails with what was
found half written. A fork spares the seconds in which libraries are imported; what a kill does to
files is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from mra_cli import export, staging
from mra_cli.manifest import read_manifest
from mra_cli.methods import make_method
from mra_cli.prepare import prepare

torch.set_num_threads(1)
source, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
random.seed(0)
WATCH = os.WNOHANG | os.WNOWAIT  # look, and leave it to be waited for


def hashes(path: Path) -> dict[str, str]:
    return {
        p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def patch(target: Path, budget: float) -> float:
    prepared = prepare(str(source), method=make_method("mra", budget))
    target = staging.check_target(target, force=True)
    return export.export(prepared, target, None, force=True).seconds


def budget_of(target: Path) -> float:
    """The budget a complete checkpoint was written with; every file is as its manifest says."""
    manifest = read_manifest(target)
    found = hashes(target)
    assert found.pop(staging.MARK)
    assert found == {name: entry["sha256"] for name, entry in manifest["files"].items()}
    (budget,) = {
        site["budget"]
        for site in json.loads((target / "mra_plan.json").read_text())["sites"].values()
    }
    return budget


before = hashes(source)
target = folder / "target"
part = folder / ".target.part"
started = time.perf_counter()
writing = patch(target, 0.5)
writing = patch(target, 0.5)
whole = (time.perf_counter() - started) / 2
seen = {"absent": 0, "old": 0, "new": 0, "leftovers": 0}
for number in range(kills):
    replacing = number % 2 == 1
    shutil.rmtree(target, ignore_errors=True)
    if replacing:
        patch(target, 0.25)
    child = os.fork()
    if child == 0:
        try:
            patch(target, 0.75)
        finally:
            os._exit(0)
    if number % 4 < 2:  # any moment
        time.sleep(random.uniform(0, 1.2 * whole))
    else:  # a moment of the writing
        while not part.exists() and os.waitid(os.P_PID, child, os.WEXITED | WATCH) is None:
            pass
        time.sleep(random.uniform(0, 1.2 * writing))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if target.exists():
        budget = budget_of(target)
        assert budget == 0.75 or (replacing and budget == 0.25), budget
        seen["new" if budget == 0.75 else "old"] += 1
    else:
        assert not replacing, "what was there is gone"
        seen["absent"] += 1
    seen["leftovers"] += any(p.name != "target" for p in folder.iterdir())
    assert hashes(source) == before, "the source has changed"
patch(target, 0.75)
assert [p.name for p in folder.iterdir()] == ["target"], "leftovers were not cleared away"
print(json.dumps(seen))
