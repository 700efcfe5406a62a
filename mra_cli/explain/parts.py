"""Parts of a row of attention that give the same output: what of the row can be explained by it.

A row ``a`` of attention matters only through ``a V``. All that lies in the left null space of V is
lost, so ``a`` is one of many rows with the same output. Four of them, by what else they keep:

- `projected`: the least norm (the effective attention of Brunner et al.); entries may be negative.
- `projected` on the span of V and the ones: the same, and the row's sum.
- `least_norm`: the least norm among distributions (quadratic program). It is also the
  distribution nearest to the effective part, for both differ by the null space alone.
- `fewest_keys`: a vertex of the set of such distributions (linear program). It has no more keys
  than V has dimensions, plus one (Caratheodory); for values in general position none has fewer.

The paper's own construction could not be verified; the last two are our reading of its efficient
attention: a probability distribution, minimal, with the same output. All in float64.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from mra_cli.errors import InputError

_STEPS = 60
_TOLERANCES = (1e-10, 1e-7)
_CONVERGED = 1e-12


def check_solver() -> None:
    """Refuse to begin without the solver of linear programs.

    Raises:
        InputError: SciPy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise InputError(
            "explain needs the package scipy for its linear programs, which is not installed; "
            "install it with: pip install 'mra-cli[explain]'"
        )


def numerical_rank(values: Tensor, eps: float) -> Tensor:
    """Rank up to rounding, int64 ``[...]``.

    Args:
        values: ``[..., M, Dv]`` float64, rows of illegal keys zero.
        eps: Of the dtype in which they were computed.
    """
    sizes = torch.linalg.svdvals(values)
    return (sizes > sizes[..., :1] * eps * max(values.shape[-2:])).sum(-1)


def span(values: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``[..., M, Dv]``, as many columns, some of them zero
    if the rank is lower."""
    left, sizes, _ = torch.linalg.svd(values, full_matrices=False)
    least = sizes[..., :1] * torch.finfo(values.dtype).eps * max(values.shape[-2:])
    return left * (sizes > least)[..., None, :]


def with_ones(values: Tensor, legal: Tensor) -> Tensor:
    """Values and a column of ones, of the size of the others: ``[..., M, Dv + 1]``.

    Args:
        legal: Bool ``[..., M]``; illegal keys get zero.
    """
    scale = values.flatten(-2).abs().amax(-1).clamp(min=1e-300)[..., None, None]
    return torch.cat([values / scale, legal[..., None].to(values.dtype)], -1)


def projected(weights: Tensor, basis: Tensor) -> Tensor:
    """The part of rows ``[..., M]`` within the span of ``basis`` ``[..., M, K]``."""
    return _times(basis, _times(basis.transpose(-1, -2), weights))


def least_norm(weights: Tensor, basis: Tensor, legal: Tensor) -> Tensor:
    """Of all rows ``p >= 0`` with ``basis' p = basis' weights``, the one of least norm, ``[R, M]``.

    A primal-dual interior-point method (Mehrotra's), for all rows at once: the quadratic form is
    the identity, so each step solves a system of only K unknowns. The keys it leaves above zero
    then give the answer in closed form.

    Args:
        weights: ``[R, M]``, not negative.
        basis: ``[R, M, K]`` from `span`.
        legal: Bool ``[R, M]``.
    """
    across, may = basis.transpose(-1, -2), legal.to(weights.dtype)
    target = _times(across, weights)
    # A column of zeros (rank below K) has nothing to say; its unknown stays zero.
    idle = torch.diag_embed((basis.square().sum(-2) == 0).to(weights.dtype))
    row = (weights + 0.1 / may.sum(-1, keepdim=True)) * may
    slack, dual = row.clone(), torch.zeros_like(target)

    def safe(part: Tensor) -> Tensor:
        return torch.where(legal, part, 1.0)

    def step(comply: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        share = row / safe(row + slack)
        push = (comply / safe(row) - (row - _times(basis, dual) - slack)) * may
        right = target - _times(across, row) - _times(across, share * push)
        curve = across @ (share[..., None] * basis) + idle
        down = torch.linalg.solve_ex(curve, right)[0]
        by = share * (_times(basis, down) + push)
        of = (comply - slack * by) / safe(row) * may
        moves, room = torch.cat([by, of], -1), torch.cat([row, slack], -1)
        ratios = torch.where(moves < 0, -room / moves, torch.inf)
        return by, of, down, ratios.amin(-1, keepdim=True).clamp(max=1.0)

    for _ in range(_STEPS):
        gap = (row * slack).sum(-1, keepdim=True) / may.sum(-1, keepdim=True)
        off = (target - _times(across, row)).norm(dim=-1)
        if bool(((gap[:, 0] < _CONVERGED**2) & (off < _CONVERGED)).all()):
            break
        by, of, _, length = step(-row * slack)  # where it would go, and what is then left
        left = ((row + length * by) * (slack + length * of)).sum(-1, keepdim=True)
        centre = (left / (row * slack).sum(-1, keepdim=True).clamp(min=1e-300)) ** 3 * gap
        by, of, down, length = step((centre - row * slack - by * of) * may)
        length = (0.995 * length).nan_to_num(0.0)
        row, slack, dual = row + length * by, slack + length * of, dual + length * down
    active = basis * ((row > slack) & legal)[..., None]
    inverse = torch.linalg.pinv(active.transpose(-1, -2) @ active, hermitian=True)
    exact = _times(active, _times(inverse, target))
    off = (target - _times(across, exact)).norm(dim=-1)
    before = (target - _times(across, row)).norm(dim=-1)
    better = (exact >= -_CONVERGED).all(-1) & (off <= before.clamp(min=_CONVERGED))
    return torch.where(better[:, None], exact.clamp(min=0), row)


def fewest_keys(weights: Tensor, basis: Tensor, legal: Tensor) -> Tensor:
    """Of all rows ``p >= 0`` with ``basis' p = basis' weights``, a vertex: the one that shares most
    with ``weights``, by a linear program. ``[R, M]``.

    Args:
        weights: ``[R, M]``, not negative.
        basis: ``[R, M, K]`` from `span`.
        legal: Bool ``[R, M]``.
    """
    from scipy.optimize import linprog

    result = torch.zeros_like(weights)
    for row, out, columns, may in zip(weights, result, basis, legal, strict=True):
        keys = may.nonzero()[:, 0]
        columns = columns[keys][:, columns.norm(dim=0) > 0]
        target = columns.T @ row[keys]
        for tolerance in _TOLERANCES:
            found = linprog(
                -row[keys].numpy(),
                A_eq=columns.T.numpy(),
                b_eq=target.numpy(),
                method="highs-ds",
                options={f"{side}_feasibility_tolerance": tolerance for side in ("primal", "dual")},
            )
            if found.x is not None:
                break
        else:
            raise RuntimeError(f"a linear program that has a solution was not solved: {found}")
        vertex = torch.from_numpy(found.x)
        chosen = vertex > 0
        # The solver stops early; on the keys it chose, the equations can be solved to rounding.
        solved = torch.linalg.lstsq(columns[chosen].T, target[:, None], driver="gelsd").solution
        out[keys[chosen]] = solved[:, 0] if bool((solved >= 0).all()) else vertex[chosen]
    return result


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
