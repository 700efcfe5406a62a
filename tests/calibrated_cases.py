"""Made-up calls with structure to find, quick fits of them, and their calibrations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from mra_cli.calibrate import calibrate as module
from mra_cli.calibrate.fits import Captured, Fit, Fitted
from mra_cli.calls import AttentionCall
from mra_cli.sites import Site
from mra_kernels import AttentionMask

N, D, HEADS, KV = 96, 8, 4, 2

QUICK = {
    "sparsefinder": {"steps": 20, "rows": 32},
    "tff": {"steps": 30, "accept": 10.0},
    "linformer": {"steps": 6, "ranks": (16, 48)},
    "sbm": {"steps": 20, "clusters": 8, "rows": 32},
}


def made(seed: int, causal: bool = False, batch: int = 1, lengths=None) -> AttentionCall:
    """Queries and keys whose dot products have structure to find: a few directions matter."""
    chance = torch.Generator().manual_seed(seed)
    basis = torch.randn(HEADS, 3, D, generator=torch.Generator().manual_seed(99))
    query = torch.randn(batch, HEADS, N, 3, generator=chance) @ basis * 1.5
    key = torch.randn(batch, KV, N, 3, generator=chance) @ basis[::2] * 1.5
    value = torch.randn(batch, KV, N, D, generator=chance)
    mask = AttentionMask.causal(N) if causal else AttentionMask.full(N, N)
    if lengths is not None:
        valid = torch.arange(N) < torch.tensor(lengths)[:, None]
        mask = mask.with_padding(valid, valid)
    return AttentionCall(query, key, value, mask, D**-0.5)


def captured(kind: str = "NS", samples: int = 3) -> Captured:
    calls = [made(seed, kind[0] == "C") for seed in range(samples)]
    site = Site("site", kind, HEADS, KV, D, D, None, (), None, 1, "patch", "")
    return Captured(site, calls[:-1], calls[-1:])


def write_calibration(path: Path, fit: Fit, fitted: Fitted, kind: str) -> None:
    """A calibration of one site, ``site``, of a model that does not exist."""
    header = {
        "schema": 1,
        "method": fit.method,
        "model": "made up",
        "fingerprint": "sha256:0",
        "length": N,
        "options": dataclasses.asdict(fit),
        "sites": {"site": {"kind": kind, **fitted.found}},
    }
    tensors = {f"site|{key}": x.contiguous() for key, x in fitted.tensors.items()}
    path.write_bytes(module.save(tensors, metadata={module.CALIBRATION_KEY: json.dumps(header)}))
