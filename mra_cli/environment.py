"""The machine and what is installed on it: what a bug report or a benchmark has to say."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mra_cli import __version__
from mra_kernels import _build, implementations, native

PACKAGES = ("torch", "transformers", "triton", "safetensors", "numpy", "gguf", "matplotlib")
FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16"),
    *("avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16"),
)
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "LD_PRELOAD"),
    *("CXX", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY", "TRITON_INTERPRET"),
)


@dataclass(frozen=True)
class Environment:
    """What decides figures and failures.

    Attributes:
        mra_cli, python, system: Versions.
        packages: Version by distribution; those that are missing are left out.
        cpu: The processor's name.
        cpu_flags: Those of its instruction sets that matter here.
        torch_cpu: The instruction set that torch's own kernels chose, and its matrix libraries.
        cores: Physical cores; None: not known.
        cpus: Logical CPUs this process may use.
        memory_bytes: Of the machine; None: not known.
        threads: Threads torch computes with.
        load: Processes that wanted a CPU, mean over the last minute; None: not known.
        compiler: C++ compiler and its version; None: none found.
        gpus: Names of CUDA devices torch sees.
        driver: Of the GPU; None: none found.
        cache: Where compiled kernels are kept.
        implementations: Why each implementation of MRA can't be used here; None: it can.
        variables: Environment variables that change timings and are set.
    """

    mra_cli: str
    python: str
    system: str
    packages: dict[str, str]
    cpu: str
    cpu_flags: tuple[str, ...]
    torch_cpu: str
    cores: int | None
    cpus: int
    memory_bytes: int | None
    threads: int
    load: float | None
    compiler: str | None
    gpus: tuple[str, ...]
    driver: str | None
    cache: str
    implementations: dict[str, str | None]
    variables: dict[str, str]

    @classmethod
    def collect(cls) -> Environment:
        """The state of things now."""
        cpuinfo = _read("/proc/cpuinfo")
        return cls(
            mra_cli=__version__,
            python=f"{platform.python_implementation()} {platform.python_version()}",
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            packages=dict(filter(lambda item: item[1], ((p, _version(p)) for p in PACKAGES))),
            cpu=_field(cpuinfo, "model name") or platform.processor() or "unknown",
            cpu_flags=_flags(cpuinfo),
            torch_cpu=_torch_cpu(),
            cores=_cores(cpuinfo),
            cpus=usable_cpus(),
            memory_bytes=_memory(),
            threads=torch.get_num_threads(),
            load=_load(),
            compiler=_compiler(),
            gpus=tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))),
            driver=_driver(),
            cache=_cache(),
            implementations=implementations(),
            variables={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Environment:
        """From what `dataclasses.asdict` made, possibly by way of JSON."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text, in the order to print."""
        memory = f", {self.memory_bytes / 2**30:.1f} GiB" if self.memory_bytes else ""
        cores = f"{self.cores} cores, " if self.cores else ""
        load = "" if self.load is None else f", load {self.load:.2f}"
        return [
            ("mra-cli", self.mra_cli),
            ("python", self.python),
            ("system", self.system),
            *self.packages.items(),
            ("cpu", f"{self.cpu}; {cores}{self.cpus} CPUs usable{memory}"),
            ("cpu flags", " ".join(self.cpu_flags) or "none known here"),
            ("torch on cpu", self.torch_cpu),
            ("threads", f"{self.threads}{load}"),
            ("compiler", self.compiler or "none found (C++); Debian: apt install g++"),
            ("gpu", ", ".join(self.gpus) or "none that torch can use"),
            ("gpu driver", self.driver or "none found"),
            ("kernel cache", self.cache),
            *(
                (f"impl {name}", "usable" if reason is None else f"not usable: {reason}")
                for name, reason in self.implementations.items()
            ),
            *self.variables.items(),
        ]

    def summary(self) -> str:
        """One line for the head of a report."""
        gpu = f", {self.gpus[0]}" if self.gpus else ""
        cpu = f"{self.cpu} ({self.cpus} CPUs, {self.torch_cpu.split(',')[0]})"
        return f"{self.system.split()[0]}, {cpu}{gpu}, torch {self.packages['torch']}"


def compile_kernels() -> float | None:
    """Compiles what is compiled at first use, so that no figure contains it.

    Returns:
        Seconds it took, 0.0 if it was done before; None: it can't be done here, and
        `mra_kernels.implementations` says why.
    """
    try:
        return native.build()
    except RuntimeError:
        return None


def usable_cpus() -> int:
    """Logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _flags(cpuinfo: str) -> tuple[str, ...]:
    known = (_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split()
    return tuple(flag for flag in FLAGS if flag in known)


def _torch_cpu() -> str:
    level = torch.backends.cpu.get_cpu_capability()
    parts = [level if level != "DEFAULT" else "no vector extensions"]
    parts += ["oneDNN"] if torch.backends.mkldnn.is_available() else []
    parts += ["MKL"] if torch.backends.mkl.is_available() else []
    return ", ".join(parts)


def _cores(cpuinfo: str) -> int | None:
    """Distinct pairs of socket and core."""
    found = re.findall(r"^physical id\s*:\s*(\d+)(?:\n.+)*?\ncore id\s*:\s*(\d+)", cpuinfo, re.M)
    return len(set(found)) or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _compiler() -> str | None:
    path = _build.compiler()
    if path is None:
        return None
    return f"{path} ({_first_line([path, '--version']) or 'no version given'})"


def _driver() -> str | None:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        version = _first_line(query)
        return f"NVIDIA {version}" if version else None
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return None


def _cache() -> str:
    where = str(_build.cache_directory())
    return where.replace(str(Path.home()), "~", 1)  # pasted where anybody can read it


def _first_line(command: list[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(run.stdout.strip().splitlines()), None)
