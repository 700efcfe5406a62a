"""Rows of attention, their parts, and what a method loses of them, by site and head."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mra_cli.analyze import choose_sites
from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.explain import parts
from mra_cli.explain.report import PARTS, ExplainReport, HeadFigures, Lost, PartFigures
from mra_cli.explain.weights import approximated_rows, exact_rows, legal_rows
from mra_cli.inputs import Samples, probe
from mra_cli.methods import Method, check_model
from mra_cli.patching import intercepted
from mra_cli.progress import Progress
from mra_cli.report import Provenance
from mra_cli.sites import Site, find_sites

TOP = 10

_TINY = 1e-300


@torch.no_grad()
def explain(
    checkpoint: Checkpoint,
    samples: Samples,
    method: Method,
    *,
    rows: int = 4,
    layers: str | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> ExplainReport:
    """Take rows of attention apart, on exact inputs.

    Args:
        checkpoint: The model.
        samples: What to feed it.
        method: Whose loss to tell.
        rows: Rows per head and sample, chosen at random.
        layers: Which sites, see `choose_sites`.
        seed: Chooses the rows.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be patched.
        InputError: ``layers`` fits no site, a site's heads have different masks, or the method was
            calibrated on another model.
    """
    started = time.perf_counter()
    check_model(method, checkpoint.fingerprint)
    progress("finding attention sites", 0, 1)
    chosen = choose_sites(find_sites(checkpoint.model, probe(samples)), layers)
    total = sum(site.calls for site in chosen) * len(samples.batches)
    found: dict[str, list[list[_Rows]]] = defaultdict(list)
    done = 0

    def record(site: Site, call: AttentionCall) -> Tensor:
        nonlocal done
        generator = torch.Generator().manual_seed(seed * 1_000_003 + len(found[site.name]))
        own = method.at(site.name) if site.kind in method.about.patterns else None
        found[site.name].append(_taken_apart(call, own, rows, generator))
        done += 1
        progress("taking attention apart", done, total)
        return call.exact()

    with intercepted(checkpoint.model, {site.name: site for site in chosen}, record):
        for batch in samples.batches:
            checkpoint.model(**batch)
    heads = []
    for site in chosen:
        for head, samples_of_head in enumerate(zip(*found[site.name], strict=True)):
            heads.append(_figures(site.name, head, _joined(list(samples_of_head))))
    return ExplainReport(
        provenance=Provenance.collect(checkpoint, samples, seed),
        method=method.settings(),
        rows=rows,
        top=TOP,
        sites=tuple(chosen),
        heads=tuple(heads),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """Figures of each row looked at, ``[R]`` each, all float64; ``[R, parts]`` where of parts.

    Squared norms, so that means over rows can be Frobenius norms.
    """

    keys: Tensor
    rank: Tensor
    norm: Tensor
    row_sum: Tensor
    negative: Tensor
    support: Tensor
    top_keys: Tensor
    total_variation: Tensor
    hellinger: Tensor
    jensen_shannon: Tensor
    output_error: Tensor
    lost: Tensor
    """``[R, 6]``: squared norms of difference, row; effective difference, effective row; output
    difference, output. NaN: left exact."""


def _taken_apart(
    call: AttentionCall, method: Method | None, count: int, generator: torch.Generator
) -> list[_Rows]:
    """The figures of the first sample's rows, by head."""
    able = call.valid_rows[0].nonzero()[:, 0]
    if call.mask is None:
        raise InputError("explain needs one mask for all heads; leave this site out with --layers")
    rows = able[torch.randperm(len(able), generator=generator)[:count]].sort().values
    exact = exact_rows(call, rows)[0].cpu()
    legal = legal_rows(call, rows)[0].cpu().expand_as(exact)
    values = call.value[0].double().cpu().repeat_interleave(exact.shape[0] // call.key.shape[1], 0)
    approximated = None
    if method is not None and method.reason_for_exact(call) is None:
        approximated = approximated_rows(method, call, rows)[0].cpu()
    eps = torch.finfo(call.value.dtype).eps
    return [
        _of_head(
            exact[head],
            values[head],
            legal[head],
            None if approximated is None else approximated[head],
            eps,
        )
        for head in range(exact.shape[0])
    ]


def _of_head(
    row: Tensor, values: Tensor, legal: Tensor, approximated: Tensor | None, eps: float
) -> _Rows:
    seen = values * legal[..., None]
    basis, basis_and_sum = parts.span(seen), parts.span(parts.with_ones(seen, legal))
    effective = parts.projected(row, basis)
    found = torch.stack(
        [
            effective,
            parts.projected(row, basis_and_sum),
            parts.least_norm(row, basis_and_sum, legal),
            parts.fewest_keys(row, basis_and_sum, legal),
        ],
        1,
    )
    output = row @ values
    scale = output.norm(dim=-1, keepdim=True).clamp(min=_TINY)
    keys = legal.sum(-1)
    lost = row.new_full((len(row), 6), torch.nan)
    if approximated is not None:
        off = approximated - row
        vectors = (off, row, parts.projected(off, basis), effective, off @ values, output)
        lost = torch.stack([vector.square().sum(-1) for vector in vectors], -1)
    total = row.sum(-1, keepdim=True).clamp(min=_TINY)[:, None]
    mine, theirs = (row[:, None] / total), (found / total).clamp(min=0)
    middle = (mine + theirs) / 2
    return _Rows(
        keys=keys.double(),
        rank=parts.numerical_rank(seen, eps).double(),
        norm=found.norm(dim=-1) / row.norm(dim=-1, keepdim=True).clamp(min=_TINY),
        row_sum=found.sum(-1),
        negative=((found < 0) & legal[:, None]).sum(-1) / keys[:, None],
        support=(found.abs() > torch.finfo(found.dtype).eps).sum(-1).double(),
        top_keys=_overlap(row, found),
        total_variation=(mine - theirs).abs().sum(-1) / 2,
        hellinger=((mine.sqrt() - theirs.sqrt()).square().sum(-1) / 2).sqrt(),
        jensen_shannon=(_bits(mine, middle) + _bits(theirs, middle)) / 2,
        output_error=(found @ values - output[:, None]).norm(dim=-1) / scale,
        lost=lost,
    )


def _overlap(row: Tensor, found: Tensor) -> Tensor:
    """Share of a row's `TOP` largest entries that are among each part's, ``[R, parts]``."""
    most = min(TOP, row.shape[-1])
    theirs = found.topk(most, -1)
    marked = torch.zeros_like(found).scatter_(-1, theirs.indices, (theirs.values > 0).double())
    own = row.topk(most, -1)
    real = (own.values > 0)[:, None]
    hit = marked.gather(-1, own.indices[:, None].expand(-1, found.shape[1], -1)) * real
    return hit.sum(-1) / real.sum(-1).clamp(min=1)


def _bits(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence in bits."""
    return torch.where(p > 0, p * (p / q.clamp(min=_TINY)).log2(), 0.0).sum(-1)


def _joined(samples: list[_Rows]) -> _Rows:
    return _Rows(*(torch.cat([getattr(s, f.name) for s in samples]) for f in fields(_Rows)))


def _figures(site: str, head: int, rows: _Rows) -> HeadFigures:
    figures = []
    for index, part in enumerate(PARTS):
        distribution = index >= PARTS.index("least norm")

        def mean(column: Tensor, index: int = index) -> float:
            return float(column[:, index].mean())

        figures.append(
            PartFigures(
                part=part,
                norm=mean(rows.norm),
                row_sum=mean(rows.row_sum),
                negative=mean(rows.negative),
                keys=mean(rows.support),
                top_keys=mean(rows.top_keys),
                total_variation=mean(rows.total_variation) if distribution else None,
                hellinger=mean(rows.hellinger) if distribution else None,
                jensen_shannon=mean(rows.jensen_shannon) if distribution else None,
                output_error=float(rows.output_error[:, index].max()),
            )
        )
    lost = None
    if not bool(rows.lost.isnan().any()):
        off, whole, off_effective, effective, off_output, output = rows.lost.sum(0).tolist()
        lost = Lost(
            weights_error=(off / max(whole, _TINY)) ** 0.5,
            effective_error=(off_effective / max(effective, _TINY)) ** 0.5,
            unseen=1 - off_effective / off if off > 0 else 0.0,
            output_error=(off_output / max(output, _TINY)) ** 0.5,
        )
    return HeadFigures(
        site=site,
        head=head,
        keys=float(rows.keys.mean()),
        rank_low=int(rows.rank.min()),
        rank=float(rows.rank.mean()),
        rank_high=int(rows.rank.max()),
        parts=tuple(figures),
        lost=lost,
    )
