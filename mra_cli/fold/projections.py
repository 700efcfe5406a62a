"""Which layers make an attention module's queries, keys, values and output: found by watching.

A linear layer makes the values if each channel of the values is, bit for bit, a column of what the
layer gave. So fused and interleaved layers are found as well, and whatever happens in between
(rotary positions, normalisation) hides the layer, as it must: the identities would not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mra_cli.calls import AttentionCall
from mra_cli.patching import intercepted
from mra_cli.sites import Site


@dataclass(frozen=True, eq=False)
class Projection:
    """The part of a linear layer that a head's channels go through.

    Attributes:
        name: The layer's qualified name.
        layer: ``nn.Linear`` or transformers' ``Conv1D``.
        channels: The layer's outputs (inputs, for the output projection) that are the channels of
            all heads, head by head, int64 ``[heads * width]``.
        factor: What its outputs are multiplied by before they arrive.
        is_output: It comes after attention.
    """

    name: str
    layer: nn.Module
    channels: Tensor
    factor: float = 1.0
    is_output: bool = False

    @property
    def weight(self) -> Tensor:
        """Float64 ``[in, channels]``, or ``[channels, out]`` after attention; factor included."""
        matrix = _in_by_out(self.layer).detach().double()
        part = matrix[self.channels] if self.is_output else matrix[:, self.channels]
        return part * self.factor

    @property
    def bias(self) -> Tensor | None:
        """Float64 ``[channels]``, or ``[out]`` after attention; None if the layer has none."""
        bias = getattr(self.layer, "bias", None)
        if bias is None:
            return None
        bias = bias.detach().double()
        return bias if self.is_output else bias[self.channels] * self.factor

    @torch.no_grad()
    def write(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Put these in the place of `weight` and `bias`; None leaves them."""
        if weight is not None:
            matrix = _in_by_out(self.layer)
            if self.is_output:
                matrix[self.channels] = weight.to(matrix.dtype)
            else:
                matrix[:, self.channels] = (weight / self.factor).to(matrix.dtype)
        if bias is not None:
            own = self.layer.bias
            assert isinstance(own, Tensor)
            if self.is_output:
                own.copy_(bias)
            else:
                own[self.channels] = (bias / self.factor).to(own.dtype)


@dataclass(frozen=True, eq=False)
class Projections:
    """The layers around one site; None: not found, for what arrives is not what a layer gave."""

    site: Site
    query: Projection | None
    key: Projection | None
    value: Projection | None
    output: Projection | None


@dataclass(frozen=True, eq=False)
class Watched:
    """One call of a site, and what went into and came out of its layers.

    Attributes:
        call: The attention call.
        query_input, key_input, value_input: What its layers were given, ``[B, N or M, in]``; None
            where no layer was found.
        output: What the output projection gave, ``[B, N, out]``, or None.
    """

    call: AttentionCall
    query_input: Tensor | None
    key_input: Tensor | None
    value_input: Tensor | None
    output: Tensor | None


@dataclass(eq=False)
class _Pending:
    """A call whose output projection has yet to be seen."""

    site: Site
    call: AttentionCall
    parts: dict[str, tuple[Projection, Tensor] | None]
    output: Tensor


class Watcher:
    """Runs a model and finds the layers around its attention calls.

    Args:
        model: The model.
        sites: Where to look.
    """

    def __init__(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        self._model, self._sites = model, sites
        self._given: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self._pending: _Pending | None = None
        self._found: list[tuple[Projections, Watched]] = []

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> list[tuple[Projections, Watched]]:
        """The layers and tensors of each call of the sites in a forward pass."""
        self._found = []
        layers = {n: m for n, m in self._model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in layers.items()]
        try:
            with intercepted(self._model, self._sites, self._attend):
                self._model(**inputs)
            self._close(None)
        finally:
            for hook in hooks:
                hook.remove()
            self._given, self._pending = [], None
        return self._found

    def _hook(self, name: str) -> Any:
        def seen(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._pending is not None:
                channels = _channels(args[0], self._pending.output)
                if channels is None:
                    self._close(None)
                else:
                    projection = Projection(name, layer, channels, is_output=True)
                    self._close((projection, output))
            self._given.append((name, layer, args[0], output))

        return seen

    def _attend(self, site: Site, call: AttentionCall) -> Tensor:
        self._close(None)
        output = call.exact()
        parts = {}
        for part, tensor in (("query", call.query), ("key", call.key), ("value", call.value)):
            parts[part] = self._maker(tensor.transpose(1, 2).flatten(2))
        self._given = []
        self._pending = _Pending(site, call, parts, output.transpose(1, 2).flatten(2))
        return output

    def _maker(self, tensor: Tensor) -> tuple[Projection, Tensor] | None:
        """The layer that gave ``[B, N, C]``, and what it was given."""
        for name, layer, given, output in reversed(self._given):
            if given.shape[:-1] != tensor.shape[:-1]:
                continue
            for factor in (1.0, _in_by_out(layer).shape[0] ** -0.5, self._per_head(tensor)):
                channels = _channels(output * factor if factor != 1.0 else output, tensor)
                if channels is not None:
                    return Projection(name, layer, channels, factor), given
        return None

    def _per_head(self, tensor: Tensor) -> float:
        """The usual factor on queries, ``head_dim ** -0.5``, where the host applies it itself."""
        heads = {site.head_dim for site in self._sites.values()}
        return float(min(heads) ** -0.5)

    def _close(self, after: tuple[Projection, Tensor] | None) -> None:
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        makers = {part: None if m is None else m[0] for part, m in pending.parts.items()}
        inputs = {f"{part}_input": None if m is None else m[1] for part, m in pending.parts.items()}
        output = (None, None) if after is None else after
        self._found.append(
            (
                Projections(pending.site, output=output[0], **makers),
                Watched(pending.call, output=output[1], **inputs),
            )
        )


def _channels(given: Tensor, wanted: Tensor) -> Tensor | None:
    """For each column of ``wanted`` the column of ``given`` that equals it, or None."""
    given, wanted = given.flatten(0, -2), wanted.flatten(0, -2)
    if len(given) != len(wanted) or given.shape[1] < wanted.shape[1]:
        return None
    where: dict[bytes, list[int]] = {}
    for index, column in enumerate(_bytes(given)):
        where.setdefault(column, []).append(index)
    found = []
    for column in _bytes(wanted):
        if not where.get(column):
            return None
        found.append(where[column].pop(0))  # columns that agree everywhere keep their order
    return torch.tensor(found, device=given.device)


def _bytes(matrix: Tensor) -> list[bytes]:
    columns = matrix.detach().float().t().contiguous().cpu().numpy()
    return [column.tobytes() for column in columns]


def _in_by_out(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.data if isinstance(layer, Conv1D) else weight.data.t()
