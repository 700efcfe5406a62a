"""SMYRF: asymmetric hashing into balanced clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.bands import Band
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_kernels import AttentionMask


@dataclass(frozen=True)
class Smyrf(Approximation):
    """Queries and keys sorted along random lines and cut into clusters that attend to each other
    (Daras et al., NeurIPS 2020, arXiv 2010.05315).

    Two transformations make the nearest key of a query the one with the largest dot product. As in
    the paper, a key met in several rounds counts several times.

    Attributes:
        hashes: Rounds of sorting.
        cluster: Keys per cluster.
        seed: Of the random lines.
    """

    name: ClassVar[str] = "smyrf"
    about: ClassVar[About] = About(
        summary="queries and keys hashed into balanced clusters, in several rounds",
        source="Daras et al., NeurIPS 2020, arXiv 2010.05315",
        patterns=("NS", "CS", "NC"),
        cost="hashes x N x (log N + cluster)",
        looks_ahead=True,
        adapted="causal: one more round, a window",
    )

    hashes: int = 4
    cluster: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hashes < 1:
            raise ValueError(f"hashes must be at least 1, got {self.hashes}")
        if self.cluster is not None and self.cluster < 1:
            raise ValueError(f"cluster must be at least 1, got {self.cluster}")

    def size(self, n_keys: int, causal: bool) -> int:
        """Keys per cluster: the setting, or what the budget allows."""
        if self.cluster is not None:
            return min(self.cluster, n_keys)
        if self.budget == 1.0:
            return n_keys
        rounds = self.hashes + 2 * causal  # half of a window is legal where half of all is
        return max(1, min(n_keys, round(self.budget * n_keys / rounds)))

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        assert call.mask is not None
        size = self.size(call.n_keys, call.mask.is_causal)
        clusters = -(-call.n_keys // size)
        hashes = self.hashes if clusters > 1 else 1
        with torch.no_grad():
            query_at, key_at = self._places(call, hashes, tally)
        rows = _in_proportion(query_at, call.mask, size, clusters)
        return {"rows": rows, "keys": _cut(key_at, size, clusters)}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        tally.settled["cluster"] = choice["keys"].shape[4]
        for own, keys in zip(choice["rows"].unbind(2), choice["keys"].unbind(2), strict=True):
            rows.add(own, keys)
        if rows.mask.is_causal and choice["keys"].shape[3] > 1:
            band = Band.of(call, self.size(call.n_keys, True))
            rows.add(band.rows, band.keys, band.keep)
        return rows.output(), rows.lse()

    def _places(self, call: AttentionCall, hashes: int, tally: Tally) -> tuple[Tensor, Tensor]:
        """Queries and keys in the order of their hash, padding last, ``[B, H, hashes, N or M]``."""
        rows = SoftmaxRows(call, Tally())
        query, key = rows.query, rows.key
        real_q, real_k = rows.mask.query_valid, rows.mask.key_valid
        squares = [x.square().sum(-1) for x in (query, key)]
        largest = [
            square if real is None else square.masked_fill(~real[:, None], 0.0)
            for square, real in zip(squares, (real_q, real_k), strict=True)
        ]
        both = sum(x.amax(-1, keepdim=True) for x in largest)
        generator = torch.Generator().manual_seed(self.seed)
        lines = torch.randn(query.shape[3] + 2, hashes, generator=generator).to(query)
        found = []
        for x, square, real, extra in (
            (query, squares[0], real_q, lines[-1]),
            (key, squares[1], real_k, lines[-2]),
        ):
            missing = (both - square).clamp(min=0).sqrt()
            score = x @ lines[:-2] + missing[..., None] * extra
            tally.products += score.numel() * lines.shape[0]
            if real is not None:
                score = score.masked_fill(~real[:, None, :, None], torch.inf)
            found.append(score.transpose(2, 3).argsort(dim=-1, stable=True))
        return found[0], found[1]


def _cut(places: Tensor, size: int, count: int) -> Tensor:
    """The last dimension in ``count`` runs of ``size``, -1 after the last."""
    more = count * size - places.shape[-1]
    return torch.nn.functional.pad(places, (0, more), value=-1).unflatten(-1, (-1, size))


def _in_proportion(places: Tensor, mask: AttentionMask, size: int, count: int) -> Tensor:
    """Real queries in as many runs as there are of ``size`` real keys, -1 where there are none."""
    device, shape = places.device, (places.shape[0], 1)
    counts = [
        torch.full(shape, length, device=device)
        if real is None
        else real.sum(1, keepdim=True).expand(shape)
        for real, length in ((mask.query_valid, mask.n_queries), (mask.key_valid, mask.n_keys))
    ]
    queries, keys = counts
    run = torch.arange(count + 1, device=device)
    begin = -(-run * queries * size // keys.clamp(min=1))  # ceil
    begin = torch.minimum(begin, queries)
    most = int((begin[:, 1:] - begin[:, :-1]).max())
    rank = begin[:, :-1, None] + torch.arange(max(1, most), device=device)
    index = rank.clamp(max=places.shape[-1] - 1)[:, None, None].expand(*places.shape[:3], -1, -1)
    found = places.gather(-1, index.flatten(-2)).view(index.shape)
    return found.masked_fill((rank >= begin[:, 1:, None])[:, None, None], -1)
