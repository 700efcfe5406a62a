"""Tokens of a picture regrouped so that a block is a patch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mra_kernels import PRESETS, MraAttentionConfig, MraKeysConfig, exact_attention, mra_attention
from mra_kernels.layout import BlockLayout, patch_shapes
from mra_kernels.testing import make_qkv


def test_image_layout_makes_blocks_of_patches():
    assert patch_shapes((32, 1)) == [(4, 8), (1, 1)]
    assert patch_shapes((16, 4, 1)) == [(4, 4), (2, 2), (1, 1)]
    layout = BlockLayout.image(1 + 8 * 16, (8, 16), (32, 1))
    assert layout.filled.sum() == 129
    assert torch.equal(layout.source[layout.slot], torch.arange(129))
    first_patch = layout.source[32:64] - 1  # block 0 is the class token's own
    assert set(first_patch.tolist()) == {r * 16 + c for r in range(4) for c in range(8)}
    nested = BlockLayout.image(64, (8, 8), (16, 4, 1))
    assert set(nested.source[:4].tolist()) == {0, 1, 8, 9}


@pytest.mark.parametrize("grid", [(8, 8), (9, 7), (5, 3)])
def test_image_layout_is_exact_at_full_budget_and_better_below(grid):
    """On keys that vary smoothly over the picture, patches beat runs of a row."""
    height, width = grid
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, cols], -1).flatten(0, 1).double()
    key = torch.cat([torch.zeros(1, 2, dtype=torch.float64), place])[None, None]
    query = key * 0.3
    value = torch.cat([torch.cos(key), torch.sin(key)], -1)
    config = MraAttentionConfig(resolutions=(16, 4, 1), budget=1.0, grid=grid)
    exact = exact_attention(query, key, value)
    torch.testing.assert_close(mra_attention(query, key, value, config=config).output, exact)
    if grid != (8, 8):
        return
    errors = []
    for shape in (grid, None):
        less = dataclasses.replace(config, budget=0.2, grid=shape)
        errors.append((mra_attention(query, key, value, config=less).output - exact).norm())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", PRESETS)
def test_empty_slots_of_an_image_layout_cost_nothing(name):
    """The density reached counts real tokens, and the budget is theirs."""
    query, key, value = make_qkv(11, batch=1, heads=2, kv_heads=2, n=197, m=197)
    config = dataclasses.replace(PRESETS[name], grid=(14, 14))
    selection = mra_attention(query, key, value, config=config).selection
    if isinstance(config, MraKeysConfig):
        filled = BlockLayout.image(197, (14, 14), (config.rows, 1)).filled
        opened = selection.opened()[0] & filled
        real = (opened * filled.unflatten(0, (-1, config.rows)).sum(1)[:, None]).sum((1, 2))
    else:
        filled = BlockLayout.image(197, (14, 14), config.resolutions).filled
        fine = selection.fine
        inner = torch.arange(fine.side)
        rows, cols = (filled[x[:, None] * fine.side + inner].sum(1) for x in (fine.row, fine.col))
        real = torch.zeros(2, dtype=torch.int64).index_add(0, fine.head, rows * cols)
    real = real / 197**2
    torch.testing.assert_close(selection.density[0], real)
    assert (selection.density <= 0.25 + selection.forced).all()
