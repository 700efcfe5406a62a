"""Fit a method to a checkpoint, site by site: resumable, and the same bytes from the same seed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mra_cli import __version__
from mra_cli.analyze import choose_sites
from mra_cli.calibrate.fits import Captured, Fit, Fitted
from mra_cli.calibrate.linformer import LinformerFit
from mra_cli.calibrate.sbm import SbmFit
from mra_cli.calibrate.sparsefinder import SparsefinderFit
from mra_cli.calibrate.tff import TffFit
from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError, UnsupportedModelError
from mra_cli.inputs import Samples, probe
from mra_cli.methods.base import knobs_of, setting
from mra_cli.methods.calibration import CALIBRATION_KEY, CALIBRATION_SCHEMA
from mra_cli.patching import intercepted
from mra_cli.progress import Progress
from mra_cli.sites import Site, find_sites
from mra_cli.staging import locked

FITS: dict[str, Fit] = {
    fit.method: fit for fit in (SparsefinderFit(), TffFit(), LinformerFit(), SbmFit())
}

CAPTURED_BYTES = 1 << 30
"""Queries, keys and values held at once; the model is run again for the sites that are left."""


def make_fit(name: str, options: Mapping[str, Any]) -> Fit:
    """How to fit a method, with some of its settings changed.

    Args:
        options: Setting names and values; values may be text, as typed on a command line.

    Raises:
        InputError: No method that is calibrated, no such setting, or a value out of range.
    """
    if name not in FITS:
        raise InputError(
            f"--method must be one that is calibrated ({', '.join(FITS)}), got {name!r}; "
            "others need no calibration"
        )
    fit: Any = FITS[name]
    knobs = knobs_of(type(fit), ())
    changes = {}
    for key, value in options.items():
        if key not in knobs:
            raise InputError(
                f"the fit of {name} has the settings {', '.join(knobs)}; got {key!r}; leave it out"
            )
        changes[key] = setting(key, value, knobs[key])
    for key, value in changes.items():
        least = 0 if key in ("window", "first", "orthogonality", "margin") else 1e-9
        if isinstance(value, int | float) and value < least:
            raise InputError(
                f"{key} must be {'at least 0' if not least else 'over 0'}, got {value}"
            )
    try:
        return replace(fit, **changes)
    except ValueError as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class CalibrateReport:
    """What `calibrate` made.

    Attributes:
        path: The tensors; beside them lies ``path.json``.
        header: What stands there: method, model, settings, and figures by site.
        resumed: Sites that had been fitted before.
    """

    path: Path
    header: dict[str, Any]
    resumed: int

    def to_json(self) -> str:
        """JSON text of the header, as it lies beside the tensors."""
        return json.dumps(self.header, indent=2, allow_nan=False)


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    samples: Samples,
    fit: Fit,
    target: Path,
    *,
    layers: str | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> CalibrateReport:
    """Fit a method to a checkpoint's sites and write what was found.

    Each site is written on its own as soon as it is fitted, so that an interrupted run goes on
    where it was; the result is the same to the byte.

    Args:
        checkpoint: The model.
        samples: All but the last quarter (at least one) are fitted on; figures are of the others.
        fit: How.
        target: The file to write.
        layers: Which sites, see `choose_sites`; None: all that can be patched, of fitting kinds.
        seed: Of all that is random.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be patched, or the method serves none of them.
        InputError: ``layers`` fits no site, or fewer than two samples.
        ExportError: Another process is at the same file.
    """
    if len(samples.batches) < 2:
        raise InputError(
            "calibrate needs samples to fit on and one to measure on, got 1; use a longer text or "
            "--samples 4"
        )
    progress("finding attention sites", 0, 1)
    chosen = choose_sites(find_sites(checkpoint.model, probe(samples)), layers)
    sites = [site for site in chosen if site.kind in fit.kinds]
    if not sites:
        raise UnsupportedModelError(
            f"{fit.method} serves {', '.join(fit.kinds)} attention, and these sites are "
            f"{', '.join(sorted({site.kind for site in chosen}))}; choose another method"
        )
    header = {
        "schema": CALIBRATION_SCHEMA,
        "method": fit.method,
        "model": checkpoint.name,
        "fingerprint": checkpoint.fingerprint,
        "inputs": samples.source,
        "inputs_digest": samples.digest,
        "samples": len(samples.batches),
        "length": samples.length,
        "seed": seed,
        "options": asdict(fit),  # type: ignore[call-overload]
        "mra_cli": __version__,
        "torch": torch.__version__,
    }
    with _resumed(target, header | {"sites": [site.name for site in sites]}) as part:
        left = [site for site in sites if not _file(part, site).exists()]
        resumed = len(sites) - len(left)
        for group in _groups(left, samples):
            progress("running the model", len(sites) - len(left), len(sites))
            captured = _captured(checkpoint, samples, group)
            for site in group:
                done = len(sites) - len(left)
                progress(f"fitting {fit.method} to site {done} of {len(sites)}", done, len(sites))
                fitted = fit(captured.pop(site.name), _generator(seed, site.name))
                _save(_file(part, site), _with_kind(fitted, site))
                left.remove(site)
        tensors: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        for site in sites:
            file = _file(part, site)
            tensors |= {f"{site.name}|{name}": x for name, x in load_file(file).items()}
            found[site.name] = json.loads(file.with_suffix(".json").read_text("utf-8"))
        header = {**header, "sites": found}
        report = CalibrateReport(target, header, resumed)
        _write(target, save(tensors, metadata={CALIBRATION_KEY: json.dumps(header)}))
        _write(target.with_name(target.name + ".json"), (report.to_json() + "\n").encode())
    return report


def _generator(seed: int, site: str) -> torch.Generator:
    """Chance of one site alone, so that it matters not which were fitted before."""
    digest = hashlib.sha256(f"{seed}:{site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _groups(sites: list[Site], samples: Samples) -> Iterator[list[Site]]:
    """Sites whose tensors are held together."""
    group: list[Site] = []
    held = 0
    for site in sites:
        width = (site.heads + site.kv_heads) * site.head_dim + site.kv_heads * site.value_dim
        size = 4 * max(1, samples.length) * width * len(samples.batches)
        if group and held + size > CAPTURED_BYTES:
            yield group
            group, held = [], 0
        group.append(site)
        held += size
    if group:
        yield group


def _captured(checkpoint: Checkpoint, samples: Samples, sites: list[Site]) -> dict[str, Captured]:
    """The calls of some sites, exact all the way, in float32 and on the CPU."""
    calls: dict[str, list[AttentionCall]] = {site.name: [] for site in sites}

    def record(site: Site, call: AttentionCall) -> Tensor:
        names = ("query", "key", "value", "bias")
        kept = {name: getattr(call, name) for name in names}
        tensors = {name: x.float().cpu() for name, x in kept.items() if x is not None}
        calls[site.name].append(replace(call, **tensors, blocks=None))
        return call.exact()

    with intercepted(checkpoint.model, {site.name: site for site in sites}, record):
        for batch in samples.batches:
            checkpoint.model(**batch)
    out = {}
    for site in sites:
        seen = calls[site.name]
        held = max(1, len(samples.batches) // 4) * len(seen) // len(samples.batches)
        out[site.name] = Captured(site, seen[:-held], seen[-held:])
    return out


def _with_kind(fitted: Fitted, site: Site) -> Fitted:
    return Fitted(fitted.tensors, {"kind": site.kind, **fitted.found})


def _file(part: Path, site: Site) -> Path:
    digest = hashlib.sha256(site.name.encode()).hexdigest()[:16]
    return part / f"{digest}.safetensors"


def _save(file: Path, fitted: Fitted) -> None:
    """The figures first: where there are tensors, there are figures."""
    text = json.dumps(fitted.found, allow_nan=False)
    _write(file.with_suffix(".json"), text.encode())
    _write(file, save({name: x.contiguous() for name, x in fitted.tensors.items()}))


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _resumed(target: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The directory of a run in progress: that of an interrupted one if it was for the same job,
    else empty. It goes away when the block ends without an error."""
    part = target.with_name(f".{target.name}.sites")
    try:
        lock = locked(part)
    except OSError as error:
        raise InputError(f"can't write {part}: {error.strerror}") from error
    try:
        note, text = part / "job.json", json.dumps(job, sort_keys=True)
        if not note.exists() or note.read_text("utf-8") != text:
            for leftover in part.iterdir():
                leftover.unlink()
            _write(note, text.encode())
        yield part
        shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(lock)
