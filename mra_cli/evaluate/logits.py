"""A model's outputs per row, and logits made from them a few rows at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_cli.sites import output_tensors

Kind = Literal["classes", "hidden", "output"]

ROWS_AT_ONCE = 256


class RowOutputs:
    """What a model says about each row of a sample (a token, or the sample itself).

    Args:
        model: The model; it is run once on the first tokens of ``batch``.
        batch: Its inputs, one sample.

    Attributes:
        kind: ``classes``: rows are choices between classes; ``hidden``: the model has no head,
            rows are its last hidden states; ``output``: anything else.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, Any]) -> None:
        self._model = model
        self.kind: Kind = "output"
        self._light = False
        self._probe({k: _first_tokens(k, value) for k, value in batch.items()})

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Rows of a sample: hidden states or logits ``[N, width]``; see `logits`."""
        if self._light:
            hidden: Tensor = self._model.base_model(**batch).last_hidden_state
            return hidden[0]
        output = self._model(**batch)
        if self.kind == "classes":
            logits: Tensor = output.logits
            return logits.flatten(0, -2)
        if self.kind == "hidden":
            states: Tensor = output.last_hidden_state
            return states[0]
        return output_tensors(output)[0]

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[n, classes]``, float32, of some of the rows."""
        if self._light:
            head = self._model.get_output_embeddings()
            assert isinstance(head, nn.Module)
            rows = head(rows)
        return rows.float()

    @torch.no_grad()
    def _probe(self, short: dict[str, Any]) -> None:
        """Can logits be had by applying the head to the base model's output, some rows at a time?

        Then a sample's logits (N x vocabulary) never have to exist at once. Models that scale or
        cap their logits say no here, and pay with memory.
        """
        output = self._model(**short)
        logits = getattr(output, "logits", None)
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            self.kind = "hidden"
        if not isinstance(logits, Tensor) or not _are_classes(logits, short):
            return
        self.kind = "classes"
        head = self._model.get_output_embeddings()
        base = self._model.base_model(**short)
        hidden = getattr(base, "last_hidden_state", None)
        if head is None or not isinstance(hidden, Tensor) or logits.ndim != 3:
            return
        if hidden.shape[:2] == logits.shape[:2]:
            same = head(hidden)
            self._light = same.shape == logits.shape and torch.allclose(same, logits)


def embedding(model: PreTrainedModel, states: Tensor) -> Tensor:
    """A sample's embedding, float64: the mean of its rows; a vision model's class token."""
    if states.ndim != 2:
        return states.double().flatten()
    return (states[0] if _has_class_token(model) else states.mean(0, dtype=torch.float64)).double()


def _has_class_token(model: PreTrainedModel) -> bool:
    if model.main_input_name != "pixel_values":
        return False
    parts = (name.rpartition(".")[2] for name, _ in model.named_parameters())
    return any(part in ("cls_token", "class_embedding") for part in parts)


def _first_tokens(key: str, value: Any) -> Any:
    short = isinstance(value, Tensor) and key.endswith(("ids", "mask"))
    return value[:, :8] if short else value


def _are_classes(logits: Tensor, batch: dict[str, Any]) -> bool:
    """Whether the last dimension is a choice: not one score, a score per token, or pixels."""
    tokens = batch.get("input_ids")
    per_token = tokens is not None and logits.shape == tokens.shape
    return logits.ndim in (2, 3) and logits.shape[-1] > 1 and not per_token
