"""The figures of a model with approximated attention against itself with exact attention."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Damage:
    """The model with approximated attention against itself with exact attention.

    Attributes:
        loss, loss_exact: Mean negative log-likelihood per token in nats (next token, or masked
            tokens); None if the model has no language-model head.
        kl: Mean Kullback-Leibler divergence of the logits' distributions from the exact ones, in
            nats; None without logits.
        top1_agreement: Share of rows whose most likely class is the same.
        cosine_mean, cosine_min: Cosine between exact and approximated embeddings, over samples;
            None for models with a head. An embedding is the mean of the last hidden states, or, in
            vision models that have one, the class token.
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
    def loss_increase(self) -> float | None:
        """Loss over the exact loss, minus 1."""
        if self.loss is None or self.loss_exact is None:
            return None
        return self.loss / self.loss_exact - 1.0

    @property
    def harm(self) -> float:
        """One number that adds up over layers: KL, or 1 minus the cosine, or the squared change of
        the output; all grow with the square of small errors.
        """
        if self.cosine_mean is not None:
            return max(0.0, 1.0 - self.cosine_mean)
        if self.output_change is not None:
            return self.output_change**2
        assert self.kl is not None
        return max(0.0, self.kl)

    @property
    def harm_words(self) -> str:
        """What `harm` is for this model."""
        if self.cosine_mean is not None:
            return "1 - cosine"
        return "squared output change" if self.output_change is not None else "KL, nats"

    def shown(self) -> dict[str, str]:
        """The figures this has, by name, as they are shown."""
        cells = {}
        if self.loss is not None:
            cells["loss (exact)"] = f"{self.loss:.4f} ({self.loss_exact:.4f})"
            cells["perplexity (exact)"] = f"{self.perplexity:.3f} ({self.perplexity_exact:.3f})"
        if self.kl is not None and self.top1_agreement is not None:
            cells["KL, nats"] = f"{self.kl:.4f}"
            cells["top-1 same"] = f"{100 * self.top1_agreement:.1f} %"
        if self.cosine_mean is not None:
            cells["embedding cosine"] = f"{self.cosine_mean:.4f}"
            cells["lowest"] = f"{self.cosine_min:.4f}"
        if self.output_change is not None:
            cells["output change"] = f"{100 * self.output_change:.1f} %"
        return cells

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
