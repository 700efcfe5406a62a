"""Runs the exact model once, then what it has become, and compares."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_cli.evaluate.damage import Damage
from mra_cli.evaluate.logits import ROWS_AT_ONCE, RowOutputs, embedding
from mra_cli.sites import check_numbers

_MASKED_SHARE = 0.15


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
        self._outputs = RowOutputs(model, self._batches[0])
        self._exact = [self._outputs(batch) for batch in self._batches]
        check_numbers(model, self._exact)

    def of_first(self) -> Judge:
        """A judge of the first sample alone, without running the exact model again."""
        one = copy.copy(self)
        one._batches, one._labels = self._batches[:1], self._labels[:1]
        one._exact = self._exact[:1]
        return one

    def judge(self) -> Damage:
        """Run the model as it is now and compare."""
        return self.judge_parts([])[0]

    @torch.no_grad()
    def judge_parts(self, sizes: Sequence[int]) -> tuple[Damage, tuple[Damage, ...]]:
        """`judge`, and the damage to parts of the samples: the first ``sizes[0]``, the next
        ``sizes[1]`` and so on; all of them, or none.
        """
        found = []
        for batch, exact, labels in zip(self._batches, self._exact, self._labels, strict=True):
            run = self._outputs(batch)
            check_numbers(self._model, [run])
            found.append(self._figures(run, exact, labels))
        figures = torch.stack(found)
        parts = tuple(self._damage(part) for part in figures.split(list(sizes))) if sizes else ()
        return self._damage(figures), parts

    def _figures(self, run: Tensor, exact: Tensor, labels: Tensor | None) -> Tensor:
        """What `_damage` needs of one sample, float64."""
        if self._outputs.kind == "hidden":
            a, b = embedding(self._model, run), embedding(self._model, exact)
            return torch.cosine_similarity(a, b, dim=0)[None].cpu()
        if self._outputs.kind == "output":
            return ((run - exact).double().norm() / exact.double().norm())[None].cpu()
        n_rows = len(run) if labels is None else len(labels)
        labelled = 0 if labels is None else int((labels >= 0).sum())
        sums = torch.zeros(4, dtype=torch.float64)
        for start in range(0, n_rows, ROWS_AT_ONCE):
            part = slice(start, min(start + ROWS_AT_ONCE, n_rows))
            target = None if labels is None else labels[part]
            logits = self._outputs.logits
            sums += _compare(logits(run[part]), logits(exact[part]), target)
        return torch.cat([sums, sums.new_tensor([n_rows, labelled])])

    def _damage(self, figures: Tensor) -> Damage:
        """The damage over samples, from one row of `_figures` each."""
        if self._outputs.kind == "hidden":
            return Damage(cosine_mean=float(figures.mean()), cosine_min=float(figures.min()))
        if self._outputs.kind == "output":
            return Damage(output_change=float(figures.mean()))
        loss, loss_exact, kl, agree, rows, labelled = figures.sum(0).tolist()
        if not labelled:
            return Damage(kl=kl / rows, top1_agreement=agree / rows)
        return Damage(loss / labelled, loss_exact / labelled, kl / rows, agree / rows)


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
