"""What approximated attention does to the model: loss, divergence, agreement, embeddings.

A `Judge` keeps what the exact model said about each sample and compares later runs with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_cli.sites import check_numbers, output_tensors

_ROWS_AT_ONCE = 256
_MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Damage:
    """The model with approximated attention against itself with exact attention.

    Attributes:
        loss, loss_exact: Mean negative log-likelihood per token in nats (next token, or masked
            tokens); None if the model has no language-model head.
        kl: Mean Kullback-Leibler divergence of the logits' distributions from the exact ones, in
            nats; None without logits.
        top1_agreement: Share of rows whose most likely class is the same.
        cosine_mean, cosine_min: Cosine between exact and approximated mean-pooled last hidden
            states, over samples; None for models with a head.
        output_change: ``||run - exact|| / ||exact||`` of the output, mean over samples; for heads
            whose output is no choice between classes (a score, spans, pixels), else None.
    """

    loss: float | None = None
    loss_exact: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    output_change: float | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else math.exp(min(self.loss, 700.0))

    @property
    def perplexity_exact(self) -> float | None:
        return None if self.loss_exact is None else math.exp(min(self.loss_exact, 700.0))

    @property
    def recovery(self) -> float:
        """How much of the exact model is left, at best 1: the exact perplexity over this one, the
        mean cosine of embeddings, the share of classes kept, or 1 minus the output's change.
        """
        if self.cosine_mean is not None:
            return self.cosine_mean
        if self.output_change is not None:
            return 1.0 - self.output_change
        if self.loss is not None and self.loss_exact is not None:
            return math.exp(min(0.0, self.loss_exact - self.loss))
        assert self.top1_agreement is not None
        return self.top1_agreement


class Judge:
    """Runs the exact model once over the samples; `judge` then runs what the model has become.

    Args:
        model: The model, unpatched.
        batches: Its inputs, one sample each.
        tokenizer: For the mask token of masked-language models.
        seed: Chooses the tokens that are masked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: list[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._labels: list[Tensor | None]
        self._batches, self._labels = _with_labels(model, batches, tokenizer, seed)
        self._kind, self._light = "output", False
        self._probe_head()
        self._exact = [self._run(batch) for batch in self._batches]
        check_numbers(model, self._exact)

    @torch.no_grad()
    def judge(self) -> Damage:
        """Run the model as it is now and compare."""
        runs = [self._run(batch) for batch in self._batches]
        check_numbers(self._model, runs)
        pairs = list(zip(runs, self._exact, strict=True))
        if self._kind == "hidden":
            cosines = [torch.cosine_similarity(_pooled(a), _pooled(b), dim=0) for a, b in pairs]
            each = torch.stack(cosines).double()
            return Damage(cosine_mean=float(each.mean()), cosine_min=float(each.min()))
        if self._kind == "output":
            changes = [float((a - b).double().norm() / b.double().norm()) for a, b in pairs]
            return Damage(output_change=sum(changes) / len(changes))
        sums = torch.zeros(4, dtype=torch.float64)
        rows = labelled = 0
        for run, exact, labels in zip(runs, self._exact, self._labels, strict=True):
            n_rows = len(run) if labels is None else len(labels)
            for start in range(0, n_rows, _ROWS_AT_ONCE):
                part = slice(start, min(start + _ROWS_AT_ONCE, n_rows))
                target = None if labels is None else labels[part]
                sums += _compare(self._logits(run[part]), self._logits(exact[part]), target)
            rows += n_rows
            labelled += 0 if labels is None else int((labels >= 0).sum())
        loss, loss_exact = (float(x) / labelled for x in sums[:2]) if labelled else (None, None)
        return Damage(loss, loss_exact, float(sums[2]) / rows, float(sums[3]) / rows)

    def _run(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states (or logits) of a sample's rows."""
        with torch.no_grad():
            if self._light:
                hidden: Tensor = self._model.base_model(**batch).last_hidden_state
                return hidden[0]
            output = self._model(**batch)
            if self._kind == "classes":
                logits: Tensor = output.logits
                return logits.flatten(0, -2)
            if self._kind == "hidden":
                states: Tensor = output.last_hidden_state
                return states[0]
            return output_tensors(output)[0]

    def _logits(self, rows: Tensor) -> Tensor:
        if self._light:
            head = self._model.get_output_embeddings()
            assert isinstance(head, nn.Module)
            rows = head(rows)
        return rows.float()

    def _probe_head(self) -> None:
        """Can logits be had by applying the head to the base model's output, some rows at a time?

        Then a sample's logits (N x vocabulary) never have to exist at once. Models that scale or
        cap their logits say no here, and pay with memory.
        """
        short = {
            key: value[:, :8]
            if isinstance(value, Tensor) and key.endswith(("ids", "mask"))
            else value
            for key, value in self._batches[0].items()
        }
        with torch.no_grad():
            output = self._model(**short)
            logits = getattr(output, "logits", None)
            if isinstance(getattr(output, "last_hidden_state", None), Tensor):
                self._kind = "hidden"
            if not isinstance(logits, Tensor) or not _are_classes(logits, short):
                return
            self._kind = "classes"
            head = self._model.get_output_embeddings()
            base = self._model.base_model(**short)
            hidden = getattr(base, "last_hidden_state", None)
            if head is None or not isinstance(hidden, Tensor) or logits.ndim != 3:
                return
            if hidden.shape[:2] == logits.shape[:2]:
                same = head(hidden)
                self._light = same.shape == logits.shape and torch.allclose(same, logits)


def _are_classes(logits: Tensor, batch: dict[str, Any]) -> bool:
    """Whether the last dimension is a choice: not one score, a score per token, or pixels."""
    tokens = batch.get("input_ids")
    per_token = tokens is not None and logits.shape == tokens.shape
    return logits.ndim in (2, 3) and logits.shape[-1] > 1 and not per_token


def _compare(run: Tensor, exact: Tensor, labels: Tensor | None) -> Tensor:
    """Summed loss, exact loss, divergence and agreement over rows."""
    log_run, log_exact = run.log_softmax(-1), exact.log_softmax(-1)
    kl = (log_exact.exp() * (log_exact - log_run)).sum()
    agree = (run.argmax(-1) == exact.argmax(-1)).sum()
    losses = [run.new_zeros(())] * 2
    if labels is not None:
        known = labels >= 0
        at = labels.clamp(min=0)[:, None]
        losses = [-(logs.gather(1, at)[:, 0] * known).sum() for logs in (log_run, log_exact)]
    return torch.stack([*losses, kl, agree]).double().cpu()


def _pooled(hidden: Tensor) -> Tensor:
    """Mean over rows: the embedding of a sample."""
    return hidden.double().mean(0) if hidden.ndim == 2 else hidden.double().flatten()


def _with_labels(
    model: PreTrainedModel,
    batches: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> tuple[list[dict[str, Any]], list[Tensor | None]]:
    """Inputs (masked for masked-language models) and the token each row should give; -1: none."""
    name = type(model).__name__
    if (
        name.endswith("ForMaskedLM")
        and tokenizer is not None
        and tokenizer.mask_token_id is not None
    ):
        generator = torch.Generator().manual_seed(seed)
        masked, labels = [], []
        for batch in batches:
            ids = batch["input_ids"]
            hit = (torch.rand(ids.shape, generator=generator) < _MASKED_SHARE).to(ids.device)
            masked.append({**batch, "input_ids": ids.masked_fill(hit, tokenizer.mask_token_id)})
            labels.append(ids[0].masked_fill(~hit[0], -1))
        return masked, [*labels]
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    reads_text = model.main_input_name == "input_ids"  # a made-up sound has no transcript
    if not (model.can_generate() and reads_text and key in batches[0]):
        return batches, [None] * len(batches)
    return batches, [batch[key][0, 1:] for batch in batches]
