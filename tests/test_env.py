"""`mra-cli env`: says what there is, and why not what there is not."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli_support import python
from mra_cli import __version__, environment
from mra_cli.environment import Environment
from mra_kernels import implementations


@pytest.fixture(scope="module")
def here() -> Environment:
    return Environment.collect()


def test_it_says_what_is_installed_and_what_runs(here):
    said = dict(here.lines())
    assert said["mra-cli"] == __version__
    assert said["torch"] == torch.__version__
    assert said["threads"].startswith(str(torch.get_num_threads()))
    assert {"cpu", "cpu flags", "compiler", "gpu", "gpu driver", "kernel cache"} <= said.keys()
    for name, reason in implementations().items():
        assert said[f"impl {name}"] == ("usable" if reason is None else f"not usable: {reason}")
    assert here.cpus >= 1 and (here.memory_bytes is None or here.memory_bytes > 1 << 28)


def test_it_survives_json(here):
    assert Environment.from_dict(json.loads(json.dumps(here.to_dict()))) == here


def test_it_does_not_tell_whose_home_it_is(here):
    assert str(Path.home()) not in "\n".join(value for _, value in here.lines()) or (
        here.compiler is not None and str(Path.home()) in here.compiler
    )


def test_processors_are_read_from_what_linux_says():
    cpuinfo = (
        "processor\t: 0\nvendor_id\t: X\nmodel name\t: Fast One\nphysical id\t: 0\nsiblings\t: 2\n"
        "core id\t\t: 0\nflags\t\t: fpu avx2 fma avx512f sse\n\n"
        "processor\t: 1\nvendor_id\t: X\nmodel name\t: Fast One\nphysical id\t: 0\nsiblings\t: 2\n"
        "core id\t\t: 1\nflags\t\t: fpu avx2 fma avx512f sse\n\n"
    )
    assert environment._field(cpuinfo, "model name") == "Fast One"
    assert environment._flags(cpuinfo) == ("avx2", "fma", "avx512f")
    assert environment._cores(cpuinfo) == 2
    assert environment._cores(cpuinfo.replace("core id\t\t: 1", "core id\t\t: 0")) == 1
    assert environment._cores("") is None


def test_what_is_missing_is_said(here):
    bare = replace(here, compiler=None, gpus=(), driver=None, load=None, cpu_flags=())
    said = dict(bare.lines())
    assert "apt install g++" in said["compiler"]
    assert said["gpu"] == "none that torch can use"
    assert said["gpu driver"] == "none found"


def test_the_command_prints_a_block_to_paste(cli, tmp_path):
    ran = cli("env", "--json", tmp_path / "env.json")
    assert ran.code == 0, ran
    lines = ran.out.splitlines()
    found = Environment.from_dict(json.loads((tmp_path / "env.json").read_text()))
    assert [line.split("  ")[0] for line in lines] == [label for label, _ in found.lines()]
    assert all(line == line.rstrip() and "\x1b" not in line for line in lines)
    assert json.loads(cli("env", "--json", "-").out)["mra_cli"] == __version__


def test_without_a_compiler_it_says_what_to_install(tmp_path):
    done = subprocess.run(
        **python("-m", "mra_cli", "env", PATH="", CXX="", XDG_CACHE_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert "not usable" in said["impl native"] and "install" in said["impl native"]
    assert said["impl reference"].strip() == "usable"
    assert "none found" in said["compiler"]
