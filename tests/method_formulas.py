"""What each method computes, entry by entry in float64: dense, slow, and sharing no code with it.

Formulas take the call, the method, and what it chose at random or by content (checked elsewhere),
and give the output ``[B, H, N, Dv]``.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from mra_kernels.scores import ScoreRule
from mra_kernels.testing import dense_logits, dense_softmax


def _dense(call):
    """Scores, who is visible, and values per query head."""
    rule = ScoreRule(call.scaling, call.softcap, call.bias)
    logits, visible = dense_logits(call.query, call.key, call.mask, rule)
    value = call.value.double().repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
    return logits, visible, value


def _key(call):
    return call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)


def _real(call):
    """Real queries and keys, bool ``[B, N]`` and ``[B, M]``."""
    ones = torch.ones(len(call.query), call.n_queries), torch.ones(len(call.query), call.n_keys)
    given = call.mask.query_valid, call.mask.key_valid
    return [
        (one > 0) & (True if valid is None else valid)
        for one, valid in zip(ones, given, strict=True)
    ]


def _capped(call, logits):
    return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)


def _sparse(call, keep):
    logits, visible, _ = _dense(call)
    return dense_softmax(logits, visible & keep, call.value, call.sinks)


def _weighted(call, weights, value):
    """Rows of non-negative weights, normalised; sinks feed the denominator."""
    total = weights.sum(-1, keepdim=True)
    if call.sinks is not None:
        total = total + call.sinks.double().exp()[None, :, None, None]
    return weights @ value / total


def vmean(call, method, choice):
    _, visible, value = _dense(call)
    return _weighted(call, visible.double(), value)


def _apart(call):
    row = torch.arange(call.n_queries)[:, None] + call.mask.query_offset
    return (row - torch.arange(call.n_keys)).abs()


def window(call, method, choice):
    return _sparse(call, _apart(call) <= method.width // 2)


def longformer(call, method, choice):
    keep = (_apart(call) <= method.width // 2).repeat(len(call.query), 1, 1, 1)
    for batch, real in enumerate(_real(call)[1]):
        first = int(real.nonzero()[0])
        tokens = slice(first, first + method.first)
        keep[batch, :, :, tokens] = True
        keep[batch, :, tokens] = True
    return _sparse(call, keep)


def bigbird(call, method, choice):
    side, causal = method.block, call.mask.is_causal
    blocks = math.ceil(call.n_keys / side)
    batch, heads = call.query.shape[:2]
    keep = torch.zeros(batch, heads, call.n_queries, call.n_keys, dtype=torch.bool)
    for b, real in enumerate(_real(call)[1]):
        places = real.nonzero()[:, 0] // side
        first, last = int(places[0]), int(places[-1])
        for h in range(heads):
            for g in range(math.ceil(call.n_queries / side)):
                near = {g - 2, g - 1, g} if causal else {g - 1, g, g + 1}
                fixed = near | ({first} if causal else {first, last})
                drawn = set(
                    choice["blocks"][b % len(choice["blocks"]), h, g, -method.random :].tolist()
                )
                assert not (drawn - {-1}) & fixed
                chosen = fixed | drawn
                if not causal and g in (first, last):
                    chosen = set(range(blocks))
                for c in chosen & set(range(blocks)):
                    keep[b, h, g * side : (g + 1) * side, c * side : (c + 1) * side] = True
    return _sparse(call, keep)


def topk(call, method, choice):
    logits, visible, _ = _dense(call)
    logits = logits.masked_fill(~visible, -torch.inf)
    rank = logits.argsort(-1, descending=True).argsort(-1)
    return _sparse(call, rank < method.keys)


def smyrf(call, method, choice):
    query, key = call.query.double(), _key(call)
    real_q, real_k = _real(call)
    generator = torch.Generator().manual_seed(method.seed)
    lines = torch.randn(query.shape[3] + 2, method.hashes, generator=generator).double()
    met = torch.zeros(*query.shape[:3], call.n_keys, dtype=torch.float64)
    size = method.cluster
    for b in range(met.shape[0]):
        for h in range(met.shape[1]):
            q, k = query[b, h], key[b, h]
            largest = sum(x[r[b]].square().sum(-1).max() for x, r in ((q, real_q), (k, real_k)))
            gap_q, gap_k = ((largest - x.square().sum(-1)).clamp(min=0).sqrt() for x in (q, k))
            nothing = torch.zeros_like(gap_q), torch.zeros_like(gap_k)
            f = torch.stack([*q.T, nothing[0], gap_q], 1)
            g = torch.stack([*k.T, gap_k, nothing[1]], 1)
            for line in lines.T:
                places = [
                    sorted(
                        range(len(x)),
                        key=lambda i: (not bool(real[i]), float((x[i] @ line).detach())),
                    )
                    for x, real in ((f, real_q[b]), (g, real_k[b]))
                ]
                n_q, n_k = int(real_q[b].sum()), int(real_k[b].sum())
                for rank, i in enumerate(places[0][:n_q]):
                    c = rank * n_k // (n_q * size)
                    met[b, h, i, places[1][c * size : (c + 1) * size]] += 1
    if call.mask.is_causal:
        met += (_apart(call) <= size).double()
    logits, visible, value = _dense(call)
    return _weighted(call, met * logits.exp() * visible, value)


def skein(call, method, choice):
    logits, visible, value = _dense(call)
    weights = (logits.exp() * visible).clone()
    exact = weights.clone()
    for b in range(weights.shape[0]):
        real = _real(call)[1][b]
        for h in range(weights.shape[1]):
            columns = choice["columns"][b, h, 0]
            columns = columns[columns >= 0]
            assert len(set(columns.tolist())) == len(columns)
            mean = logits[b, h][:, columns].mean(1, keepdim=True).exp()
            filled = mean * real
            filled[:, columns] = exact[b, h][:, columns]
            pilots = choice["pilots"][b, 0, 0]
            filled[pilots] = exact[b, h][pilots]
            weights[b, h] = filled
    return _weighted(call, weights, value)


def probsparse(call, method, choice):
    logits, visible, _ = _dense(call)
    output = vmean(call, method, choice)
    exact = dense_softmax(logits, visible, call.value)
    for b in range(output.shape[0]):
        for h in range(output.shape[1]):
            rows = choice["rows"][b, h, 0]
            rows = rows[rows >= 0]
            output[b, h, rows] = exact[b, h, rows]
    return output


def _features(call, method):
    from mra_cli.methods.features import orthogonal_features

    w = orthogonal_features(method.features, call.query.shape[3], method.seed)
    q, k = (x * math.sqrt(call.scaling) for x in (call.query.double(), _key(call)))
    return [(x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() for x in (q, k)]


def performer(call, method, choice):
    _, visible, value = _dense(call)
    q, k = _features(call, method)
    return _weighted(call, q @ k.transpose(2, 3) / method.features * visible, value)


def scatterbrain(call, method, choice):
    logits, visible, value = _dense(call)
    q, k = _features(call, method)
    near = _apart(call) <= method.width // 2
    weights = torch.where(near, logits.exp(), q @ k.transpose(2, 3) / method.features)
    return _weighted(call, weights * visible, value)


def nystrom(call, method, choice):
    _, _, value = _dense(call)
    query, key = call.query.double(), _key(call)
    real_q, real_k = _real(call)
    count = min(method.landmarks, int(real_q.sum(1).min()), int(real_k.sum(1).min()))
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for b in range(len(query)):
        for h in range(query.shape[1]):
            q, k = query[b, h], key[b, h][real_k[b]]
            marks = []
            for x in (q[real_q[b]], k):
                cut = [math.ceil(i * len(x) / count) for i in range(count + 1)]
                marks.append(torch.stack([x[a:z].mean(0) for a, z in pairwise(cut)]))
            f, a, z = (
                _capped(call, x @ y.T * call.scaling).softmax(-1)
                for x, y in ((q, marks[1]), (marks[0], marks[1]), (marks[0], k))
            )
            inverse = a.T / (a.sum(0).max() * a.sum(1).max())
            eye = torch.eye(count, dtype=torch.float64)
            for _ in range(method.iterations):
                p = a @ inverse
                inverse = inverse @ (13 * eye - p @ (15 * eye - p @ (7 * eye - p))) / 4
            output[b, h] = f @ inverse @ z @ value[b, h][real_k[b]]
    return output


def h1d(call, method, choice):
    logits, visible, _ = _dense(call)
    query, key = call.query.double(), _key(call)
    real_q, real_k = _real(call)
    out = logits.clone()
    for b in range(len(query)):
        for i in range(call.n_queries):
            for j in range(call.n_keys):
                level, size = 0, 2 * method.block
                while i // size != j // size:
                    level, size = level + 1, 2 * size
                merged = 2**level
                if level == 0:
                    continue
                keys = range(j // merged * merged, (j // merged + 1) * merged)
                keys = [x for x in keys if x < call.n_keys and real_k[b, x]]
                rows = range(i // merged * merged, (i // merged + 1) * merged)
                rows = [x for x in rows if x < call.n_queries and real_q[b, x]]
                rows = [i] if call.mask.is_causal or not rows else rows
                if keys:
                    mean_q, mean_k = query[b][:, rows].mean(1), key[b][:, keys].mean(1)
                    score = _capped(call, (mean_q * mean_k).sum(-1) * call.scaling)
                    out[b, :, i, j] = score
    return dense_softmax(out, visible, call.value, call.sinks)


def combiner_fixed(call, method, choice):
    logits, visible, value = _dense(call)
    query, key = call.query.double(), _key(call)
    real_k = _real(call)[1]
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    size = method.segment
    for b in range(len(query)):
        for i in range(call.n_queries):
            own = range(i // size * size, min((i // size + 1) * size, call.n_keys))
            own = [j for j in own if visible[b, 0, i, j]]
            scores, values = [logits[b, :, i, own]], [value[b][:, own]]
            for g in range(math.ceil(call.n_keys / size)):
                if g == i // size or (call.mask.is_causal and g > i // size):
                    continue
                keys = [
                    j for j in range(g * size, min((g + 1) * size, call.n_keys)) if real_k[b, j]
                ]
                if not keys:
                    continue
                k = key[b][:, keys]
                pooled = query[b][:, keys].mean(1, keepdim=True)
                inner = _capped(call, pooled @ k.transpose(1, 2) * call.scaling).softmax(-1)
                values.append(inner @ value[b][:, keys])
                mean = k.mean(1, keepdim=True).transpose(1, 2)
                score = _capped(call, (query[b][:, i : i + 1] @ mean)[:, 0] * call.scaling)
                scores.append(score + math.log(len(keys)))
            weights = torch.cat(scores, 1).exp()[:, None]
            total = weights.sum(-1, keepdim=True)
            if call.sinks is not None:
                total = total + call.sinks.double().exp()[:, None, None]
            output[b, :, i] = (weights @ torch.cat(values, 1) / total)[:, 0]
    return output


def cluster_kv(call, method, choice):
    _, visible, value = _dense(call)
    query, key = call.query.double(), _key(call)
    means = torch.zeros_like(key)
    for b in range(len(key)):
        for h in range(key.shape[1]):
            for c in choice["cluster"][b, h].unique():
                members = choice["cluster"][b, h] == c
                means[b, h, members] = key[b, h][members].mean(0)
    scores = _capped(call, query @ means.transpose(2, 3) * call.scaling)
    return _weighted(call, scores.exp() * visible, value)


FORMULAS = {
    "vmean": vmean,
    "window": window,
    "longformer": longformer,
    "bigbird": bigbird,
    "topk": topk,
    "smyrf": smyrf,
    "skein": skein,
    "probsparse": probsparse,
    "performer": performer,
    "scatterbrain": scatterbrain,
    "nystrom": nystrom,
    "h1d": h1d,
    "combiner-fixed": combiner_fixed,
    "cluster-kv": cluster_kv,
}
