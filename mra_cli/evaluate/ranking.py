"""Pair ranking on encoders: can a passage find the one that followed it in its text?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate.logits import RowOutputs, embedding
from mra_cli.evaluate.scores import Measure
from mra_cli.inputs import Samples, make_samples

_PAIRS = 32
_FEWEST = 4


@dataclass(frozen=True, eq=False)
class PairRanking:
    """The task; `make` makes it.

    Attributes:
        checkpoint: The model.
        firsts, seconds: Inputs of passages and of those that followed them.
        length: Tokens of a passage.
    """

    checkpoint: Checkpoint
    firsts: list[dict[str, Any]]
    seconds: list[dict[str, Any]]
    length: int

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        samples: Samples,
        text: str,
        length: int | None,
        count: int,
        seed: int,
    ) -> PairRanking:
        """Pairs of adjacent passages of ``length`` tokens, spread over the text.

        Raises:
            InputError: Not an encoder of texts without a head, or the text is too short.
        """
        model, length = checkpoint.model, length or samples.length
        reads = model.main_input_name == "input_ids" and checkpoint.tokenizer is not None
        kind = RowOutputs(model, samples.batches[0]).kind
        if not reads or kind != "hidden" or model.config.is_encoder_decoder:
            raise InputError(
                f"the task ranking is for encoders of texts that give embeddings; "
                f"{checkpoint.name} is {type(model).__name__}; leave it out"
            )
        passages = make_samples(
            checkpoint, text=text, seq_len=length, count=1 << 30, seed=seed
        ).batches
        pairs = len(passages) // 2
        if pairs < _FEWEST:
            raise InputError(
                f"ranking:{length} needs a text of at least {2 * _FEWEST * length} tokens, got "
                f"about {len(passages) * length}; use a longer one or shorter passages"
            )
        chosen = range(0, pairs, max(1, pairs // _PAIRS))[:_PAIRS]
        return cls(
            checkpoint,
            [passages[2 * i] for i in chosen],
            [passages[2 * i + 1] for i in chosen],
            length,
        )

    @property
    def name(self) -> str:
        return f"ranking {len(self.firsts)} passages of {self.length} tokens"

    @property
    def items(self) -> int:
        return len(self.firsts)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Cosines ``[pairs, pairs]`` of each first passage with each second one."""
        model = self.checkpoint.model
        outputs = RowOutputs(model, self.firsts[0])
        sides = [
            torch.stack([embedding(model, outputs(batch)) for batch in side])
            for side in (self.firsts, self.seconds)
        ]
        first, second = (torch.nn.functional.normalize(side, dim=1) for side in sides)
        return first @ second.T

    def measures(self, exact: Tensor, run: Tensor) -> tuple[Measure, ...]:
        before, after = _ranks(exact), _ranks(run)
        measures = [
            Measure(f"recall@{k}", _share(before <= k), _share(after <= k), percent=True)
            for k in (1, 5)
        ]
        mrr = [float((1 / ranks).mean()) for ranks in (before, after)]
        measures.append(Measure("mean reciprocal rank", mrr[0], mrr[1]))
        same = _share(exact.argmax(1) == run.argmax(1))
        return (*measures, Measure("same first choice", 1.0, same, percent=True))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _ranks(cosines: Tensor) -> Tensor:
    """Rank of the right passage, from 1, by row."""
    return 1.0 + (cosines > cosines.diag()[:, None]).sum(1).double()
