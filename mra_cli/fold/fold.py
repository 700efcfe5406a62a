"""Fold a model: find its projections, say what every identity does, write what a class can hold."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mra_cli.analyze import choose_sites
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import ExportError, InputError
from mra_cli.evaluate import Judge
from mra_cli.fold.identities import apply_biases, figures
from mra_cli.fold.projections import Projections, Watched, Watcher
from mra_cli.fold.report import FoldReport
from mra_cli.fold.variants import Variant, fit
from mra_cli.inputs import Samples, probe
from mra_cli.progress import Progress
from mra_cli.report import Provenance
from mra_cli.sites import find_sites, output_tensors
from mra_cli.staging import staged

REPORT_FILE, MIXING_FILE = "mra_fold.json", "super_mixing.safetensors"

PARITY = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest relative change of the model's output that rounding explains; half types 0.05."""

Calls = dict[str, list[tuple[Projections, Watched]]]


@torch.no_grad()
def fold(
    checkpoint: Checkpoint,
    samples: Samples,
    *,
    layers: str | None = None,
    seed: int = 0,
    target: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> FoldReport:
    """Say what every exact identity does, and fold the biases if there is somewhere to write to.

    The model that was given is changed by that.

    Args:
        checkpoint: The model.
        samples: What to check the identities and the folded model on.
        layers: Which sites, see `choose_sites`.
        seed: What the samples were made with.
        target: Directory to make, as `staging.check_target` returns it.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be looked into.
        InputError: ``layers`` fits no site.
        ExportError: Nothing can be folded; or the folded model is another; or it can't be written.
    """
    progress("watching the model", 0, 2)
    calls = _watch(checkpoint, samples, layers, count=1)
    identities = [figure for site_calls in calls.values() for figure in figures(*site_calls[0])]
    report = FoldReport(
        provenance=Provenance.collect(checkpoint, samples, seed),
        identities=tuple(identities),
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
    )
    if target is None:
        return report
    if not report.folded:
        raise ExportError(
            f"nothing of {checkpoint.name} can be folded into a checkpoint of its class; see why "
            "by leaving out --out"
        )
    progress("folding", 1, 2)
    before = _outputs(checkpoint, samples)
    judge = Judge(checkpoint.model, samples.batches, checkpoint.tokenizer, seed)
    for site_calls in calls.values():
        apply_biases(site_calls[0][0])
    after = _outputs(checkpoint, samples)
    pairs = zip(after, before, strict=True)
    parity = max(float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs)
    if not parity <= PARITY.get(checkpoint.dtype, 0.05):
        raise ExportError(
            f"the folded model must give the same output, and it moved by {parity:.2g}; nothing "
            "was written; please report it"
        )
    report = replace(report, damage=judge.judge(), parity=parity, written=str(target))
    _write(checkpoint, target, report, {})
    return report


@torch.no_grad()
def start_variant(
    checkpoint: Checkpoint,
    samples: Samples,
    *,
    kind: str,
    layers: str | None = None,
    seed: int = 0,
    target: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> FoldReport:
    """Fit one of the leaner variants as a start for training; the model that was given becomes it.

    Args:
        checkpoint, layers, seed, target, progress: As for `fold`.
        samples: All but the last are fitted on; errors are told on the last.
        kind: One of `VARIANTS`.

    Raises:
        UnsupportedModelError: No site can be looked into.
        InputError: A site can't become this variant, or there is only one sample.
        ExportError: It can't be written.
    """
    if len(samples.batches) < 2:
        raise InputError("--as fits on all samples but the last, and got only one; use --samples 8")
    progress("watching the model", 0, 2)
    calls = _watch(checkpoint, samples, layers, count=len(samples.batches))
    identities = [f for c in calls.values() for f in figures(*c[0])]
    variants = []
    for number, site_calls in enumerate(calls.values()):
        progress(f"fitting {kind} attention", number, len(calls) + 1)
        variants.append(fit(kind, site_calls[:-1], site_calls[-1][1]))
    report = FoldReport(
        provenance=Provenance.collect(checkpoint, samples, seed),
        identities=tuple(identities),
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        variant=kind,
        variant_sites=tuple(variant.figures for variant in variants),
        written=None if target is None else str(target),
    )
    progress(f"running the {kind} model", len(calls), len(calls) + 1)
    judge = Judge(checkpoint.model, samples.batches[-1:], checkpoint.tokenizer, seed)
    for variant in variants:
        variant.write()
    with _mixing(variants):
        report = replace(report, damage=judge.judge())
    if target is not None:
        mixing = {v.found.site.name: v.mixing for v in variants if v.mixing is not None}
        _write(checkpoint, target, report, mixing)
    return report


def _watch(checkpoint: Checkpoint, samples: Samples, layers: str | None, count: int) -> Calls:
    """What `Watcher` sees of the first samples, by site; a site called again is the same layers."""
    chosen = choose_sites(find_sites(checkpoint.model, probe(samples)), layers)
    watcher = Watcher(checkpoint.model, {site.name: site for site in chosen})
    calls: Calls = defaultdict(list)
    for batch in samples.batches[:count]:
        seen = set()
        for found, watched in watcher.run(batch):
            if found.site.name not in seen:
                calls[found.site.name].append((found, watched))
                seen.add(found.site.name)
    return calls


def _outputs(checkpoint: Checkpoint, samples: Samples) -> list[Tensor]:
    runs = [output_tensors(checkpoint.model(**batch))[0] for batch in samples.batches]
    return [run.double() for run in runs]


@contextmanager
def _mixing(variants: list[Variant]) -> Iterator[None]:
    """The value layers with their mixing of positions, for as long as the context is open."""

    def mixed(matrix: Tensor, channels: Tensor) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            result = output.clone()
            result[..., channels] = matrix.to(output.dtype) @ output[..., channels]
            return result

        return hook

    hooks = []
    for variant in variants:
        value = variant.found.value
        if variant.mixing is not None and value is not None:
            hook = mixed(variant.mixing, value.channels)
            hooks.append(value.layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _write(
    checkpoint: Checkpoint, target: Path, report: FoldReport, mixing: dict[str, Tensor]
) -> None:
    """Write the model as it is now, complete or not at all."""
    with staged(target, force=False) as part:
        checkpoint.model.save_pretrained(part)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(part)
        if mixing:
            tensors = {name: matrix.float().contiguous() for name, matrix in mixing.items()}
            save_file(tensors, part / MIXING_FILE)
        text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
        (part / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
