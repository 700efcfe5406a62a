"""Why the default method is what it is: rules for choosing what attention computes exactly, judged
by what they do to a model at the same density.

    python examples/recipe_study.py demo:minilm --seq-len 512 --samples 4 --text prose.txt
    python examples/recipe_study.py demo:smollm2 --seq-len 1024 --samples 1 --text prose.txt

Rules are emulated on dense scores, slowly, so that any can be tried; the one that won is
`mra_kernels.keys`. The tables of recipe_study.md were printed by this script.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import load_checkpoint
from mra_cli.evaluate import Judge
from mra_cli.inputs import make_samples, probe
from mra_cli.patching import intercepted
from mra_cli.sites import Site, find_sites
from mra_kernels.features import Directions


@dataclass(frozen=True)
class Rule:
    """A way to choose, per block of ``rows`` queries, groups of ``keys`` keys to compute exactly.

    Attributes:
        rows, keys: Queries and keys per block.
        probe: Queries averaged before they are scored; ``oracle``: true mass of each block.
        pooled_keys: Score the mean key of each group instead of every key.
        rank: Features that scores are estimated from; None: all.
        best: What a block is worth: the ``max`` or ``mean`` over its probes.
        relative: Scores count relative to the probe's ``lse`` over all keys, or to its ``max``.
        scope: Blocks compete within a ``head``, or a ``layer``.
        tail: The rest: ``none``, ``pooled`` (at the mean query), ``tilted`` (to first order), or
            ``blocks`` (one mean key and value per block of 16 keys, for every query).
    """

    rows: int = 16
    keys: int = 1
    probe: int | Literal["oracle"] = 1
    pooled_keys: bool = False
    rank: int | None = 16
    best: Literal["max", "mean"] = "max"
    relative: Literal["lse", "max"] = "lse"
    scope: Literal["head", "layer"] = "head"
    tail: Literal["none", "pooled", "tilted", "blocks"] = "tilted"


RULES = {
    "mra": Rule(rank=24),
    "16 features": Rule(),
    "true mass (oracle)": Rule(probe="oracle"),
    "all features": Rule(rank=None),
    "8 features": Rule(rank=8),
    "2 queries a probe": Rule(probe=2, rank=None),
    "4 queries a probe": Rule(probe=4, rank=None),
    "16 queries a probe": Rule(probe=16, rank=None),
    "4 queries, 4 pooled keys": Rule(probe=4, keys=4, pooled_keys=True, rank=None),
    "groups of 4 keys": Rule(keys=4),
    "mean over probes": Rule(best="mean"),
    "relative to the maximum": Rule(relative="max"),
    "heads compete": Rule(scope="layer"),
    "32 queries a block": Rule(rows=32),
    "8 queries a block": Rule(rows=8),
    "tail pooled": Rule(tail="pooled"),
    "tail of key blocks": Rule(tail="blocks"),
    "no tail": Rule(tail="none"),
}


def attend(call: AttentionCall, rule: Rule, budget: float) -> Tensor:
    """Output ``[1, H, N, Dv]`` of an unpadded call."""
    assert call.mask is not None
    per_kv = call.query.shape[1] // call.key.shape[1]
    query = call.query[0]
    key, value = (x[0].repeat_interleave(per_kv, 0) for x in (call.key, call.value))
    visible = call.mask.rows(0, call.n_queries)[0]
    logits = (query @ key.mT * call.scaling).masked_fill(~visible, -torch.inf)
    seen = _cut(visible.float(), rule.rows, rule.keys).sum((-3, -1))
    size = _cut(torch.ones_like(visible, dtype=torch.float32), rule.rows, rule.keys).sum((-3, -1))
    worth = _worth(call, rule, query, key, logits, visible)
    forced = (seen > 0) & (seen < size)
    first = torch.arange(seen.shape[1]) * rule.keys < 16
    worth = worth + 1e3 * (first & (seen > 0)) + 1e6 * forced
    opened = _best(worth.masked_fill(seen == 0, -1.0), seen, budget, rule.scope) & (seen > 0)
    exact = _spread(opened, rule, logits.shape) & visible
    parts = [logits.masked_fill(~exact, -torch.inf)]
    values = [value]
    whole = _spread((seen == size)[None], rule, logits.shape)[0]
    output = torch.zeros_like(query)
    if rule.tail == "blocks":
        left = _cut((visible & ~exact).float(), 1, 16).sum((-3, -1))
        mean_key, mean_value = (_means(x, 16) for x in (key, value))
        parts.append(query @ mean_key.mT * call.scaling + left.log())
        values.append(mean_value)
    weights = torch.cat(parts, -1)
    if rule.tail in ("pooled", "tilted"):
        mean = _means(query, rule.rows).repeat_interleave(rule.rows, 1)[:, : len(query[0])]
        rest = (mean @ key.mT * call.scaling).masked_fill(exact | ~whole, -torch.inf)
        lse = rest.logsumexp(-1, keepdim=True)
        share = (rest - lse.clamp(min=-1e30)).exp()
        if rule.tail == "tilted":
            lse = lse + ((query - mean) * (share @ key)).sum(-1, keepdim=True) * call.scaling
        total = torch.cat([weights, lse], -1).softmax(-1)
        output = total[..., -1:] * (share @ value)
        weights = total[..., :-1]
    else:
        weights = weights.softmax(-1)
    output = output + weights @ torch.cat(values, 1)
    return output[None]


def _answer(site: Site, call: AttentionCall, rule: Rule, budget: float) -> Tensor:
    return attend(call, rule, budget)


def _worth(
    call: AttentionCall, rule: Rule, query: Tensor, key: Tensor, logits: Tensor, visible: Tensor
) -> Tensor:
    """What opening each block is worth, ``[H, blocks, key groups]``."""
    if rule.probe == "oracle":
        mass = _cut(logits.softmax(-1), rule.rows, rule.keys)
        return mass.sum((-3, -1)) / rule.keys
    if rule.rank is not None:
        assert call.mask is not None
        directions = Directions.leading(query[None], key[None], call.mask, rule.rank)
        query, key = (x[0] for x in directions.features(query[None], key[None]))
    scored = _means(key, rule.keys).repeat_interleave(rule.keys, 1) if rule.pooled_keys else key
    scores = _means(query, rule.probe) @ scored[:, : key.shape[1]].mT * call.scaling
    some = _cut(visible, rule.probe, 1).any(-3)[..., 0]
    scores = scores.masked_fill(~some, -torch.inf)
    lse = scores.logsumexp(-1) if rule.relative == "lse" else scores.amax(-1)
    mass = _cut((scores - lse[..., None]).exp(), rule.rows // rule.probe, rule.keys).sum(-1)
    return mass.amax(-2) if rule.best == "max" else mass.mean(-2)


def _best(worth: Tensor, price: Tensor, budget: float, scope: str) -> Tensor:
    """The most valuable blocks that the budget pays for, and those that are worth over 1e6."""
    rows = worth.flatten(1) if scope == "head" else worth.reshape(1, -1)
    prices = price.flatten().repeat(rows.shape[1] // price.numel())
    order = rows.argsort(1, descending=True)
    paid = prices[order].cumsum(1) <= budget * prices.sum()
    paid |= rows.gather(1, order) >= 1e6
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, paid).view_as(worth)


def _cut(x: Tensor, rows: int, keys: int) -> Tensor:
    """``[..., n, m]`` in blocks, ``[..., blocks, rows, groups, keys]``; padded with zeros."""
    pad = (0, -x.shape[-1] % keys, 0, -x.shape[-2] % rows)
    return torch.nn.functional.pad(x, pad).unflatten(-1, (-1, keys)).unflatten(-3, (-1, rows))


def _means(tokens: Tensor, side: int) -> Tensor:
    """Means of ``side`` neighbours, ``[H, blocks, D]``."""
    missing = -tokens.shape[1] % side
    sums = torch.nn.functional.pad(tokens, (0, 0, 0, missing)).unflatten(1, (-1, side)).sum(2)
    count = torch.full((sums.shape[1], 1), float(side))
    count[-1] -= missing
    return sums / count


def _spread(blocks: Tensor, rule: Rule, shape: torch.Size) -> Tensor:
    """What is said of blocks, for each entry ``[H, N, M]``."""
    entries = blocks.repeat_interleave(rule.rows, -2).repeat_interleave(rule.keys, -1)
    return entries[..., : shape[-2], : shape[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rules of choice, by what they do to a model.")
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES))
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.model)
    judges = []
    for path in options.text:
        samples = make_samples(
            checkpoint, text=path.read_text(), seq_len=options.seq_len, count=options.samples
        )
        judges.append(Judge(checkpoint.model, samples.batches, checkpoint.tokenizer))
    found = find_sites(checkpoint.model, probe(samples))
    sites = {site.name: site for site in found if site.verdict == "patch"}
    print("| rule | " + " | ".join(path.stem for path in options.text) + " |")
    print("| --- |" + " ---: |" * len(judges))
    for name in options.rules:
        cells = []
        for judge in judges:
            answer = partial(_answer, rule=RULES[name], budget=options.budget)
            with intercepted(checkpoint.model, sites, answer):
                damage = judge.judge()
            if damage.kl is None:
                cells.append(f"{damage.cosine_mean:.4f}")
            else:
                cells.append(f"KL {damage.kl:.4f}, {100 * (1 / damage.recovery - 1):+.2f} %")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
