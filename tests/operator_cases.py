"""Random calls of the operator: shapes, masks, settings and extras."""

import torch
from hypothesis import strategies as st

from mra_kernels import AttentionMask, MraAttentionConfig
from mra_kernels.testing import make_qkv

RESOLUTIONS = [(32, 1), (16, 4, 1), (8, 1), (12, 6, 2, 1)]


@st.composite
def cases(draw):
    """Inputs, mask, config and extras of one random call."""
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    n = draw(st.integers(1, 80))
    m = n if draw(st.booleans()) else draw(st.integers(1, 80))
    seed = draw(st.integers(0, 2**16))
    query, key, value = make_qkv(
        seed,
        batch,
        kv_heads * group,
        kv_heads,
        n,
        m,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
    )
    kind = draw(st.sampled_from(["full", "causal", "offset", "window", "chunk", "dense"]))
    generator = torch.Generator().manual_seed(seed + 1)
    if kind == "full":
        mask = AttentionMask.full(n, m)
    elif kind == "dense":
        visible = torch.rand(1, n, m, generator=generator) < 0.6
        mask = AttentionMask.from_dense(visible)
    else:
        extra = {
            "offset": {"offset": draw(st.integers(0, 20))},
            "window": {"window": draw(st.integers(1, 40))},
            "chunk": {"chunk": draw(st.integers(1, 40))},
        }.get(kind, {})
        mask = AttentionMask.causal(n, m, **extra)
    if draw(st.booleans()):
        valid = torch.ones(batch, m, dtype=torch.bool)
        for row in valid:
            padding = draw(st.integers(0, m - 1))
            row[slice(0, padding) if draw(st.booleans()) else slice(m - padding, m)] = False
        mask = mask.with_padding(valid, valid if n == m else None)
    heads = kv_heads * group
    resolutions = draw(st.sampled_from(RESOLUTIONS))
    wider = st.sampled_from([None, 1, 2, 3]) if len(resolutions) == 2 else st.none()
    times = draw(wider)
    config = MraAttentionConfig(
        resolutions=resolutions,
        query_rows=None if times is None else times * resolutions[0],
        budget=draw(st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.0])),
        coarse=draw(st.sampled_from(["pooled", "per_query", "none"])),
        score=draw(st.sampled_from(["row", "mu"])),
        scope=draw(st.sampled_from(["head", "row"])),
        first_blocks=draw(st.integers(0, 1)),
        diagonal_blocks=draw(st.integers(0, 3)),
    )
    extras = {
        "scaling": draw(st.sampled_from([0.1, 0.5])),
        "softcap": draw(st.sampled_from([None, 3.0])),
        "sinks": torch.randn(heads, generator=generator, dtype=torch.float64)
        if draw(st.booleans())
        else None,
        "bias": torch.randn(1, heads, n, m, generator=generator, dtype=torch.float64)
        if draw(st.booleans())
        else None,
    }
    return query, key, value, mask, config, extras
