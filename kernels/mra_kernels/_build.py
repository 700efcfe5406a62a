"""Compiles the C++ of this package for the machine at hand, once; the library is cached on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).with_name("_cpu")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
_COMPILERS = ("g++", "clang++", "c++")


def compiler() -> str | None:
    """The C++ compiler to use: ``$CXX``, or the first of g++, clang++ and c++ on the path."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _COMPILERS)), None)


def cache_directory() -> Path:
    """Where compiled libraries are kept: ``$XDG_CACHE_HOME/mra-cli``, by default ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mra-cli"


def reason_against() -> str | None:
    """Why nothing can be compiled here, in one line; None if it can, as far as one can tell."""
    if sys.platform == "win32":
        return "native needs Linux or macOS; use impl='reference'"
    if compiler() is None:
        return (
            "native needs a C++ compiler and found none of $CXX, "
            f"{', '.join(_COMPILERS)}; install one (Debian: apt install g++)"
        )
    return None


def compiled() -> Path:
    """The compiled library, made now if it is not in the cache.

    Raises:
        RuntimeError: No compiler, or it fails; one line.
    """
    reason, cxx = reason_against(), compiler()
    if reason or not cxx:
        raise RuntimeError(reason)
    library = _place(cxx)
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=library.parent)
    except OSError:
        folder = tempfile.mkdtemp()  # a read-only home: compiled anew in every process
        library = Path(folder) / library.name
    made = Path(folder) / "new.so"
    sources = map(str, sorted(_SOURCES.glob("*.cpp")))
    command = [cxx, *_flags(), *sources, "-o", str(made)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[0]
        raise RuntimeError(
            f"native needs {cxx} to compile it with OpenMP, which failed: {last}; "
            "try another one, CXX=clang++ say"
        )
    made.replace(library)
    if library.parent != Path(folder):
        shutil.rmtree(folder)
    return library


def _flags() -> list[str]:
    """For this very processor, unless ``$CXXFLAGS`` says otherwise."""
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return [*_FLAGS, tune, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def is_cached() -> bool:
    """Whether the library need not be compiled any more."""
    cxx = compiler()
    return cxx is not None and _place(cxx).exists()


def _place(cxx: str) -> Path:
    """Differs with the sources, the flags, the compiler and the processor."""
    parts = [path.read_bytes() for path in sorted(_SOURCES.iterdir()) if path.is_file()]
    text = b"\0".join([*parts, _machine(cxx).encode(), *map(str.encode, _flags())])
    return cache_directory() / f"cpu-{hashlib.sha256(text).hexdigest()[:16]}.so"


@functools.cache
def _machine(cxx: str) -> str:
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return "\n".join([version, platform.machine(), flags])
