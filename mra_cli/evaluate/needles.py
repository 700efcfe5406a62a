"""Multi-key retrieval: many facts hidden in a long text, every one of them asked for at its end.

After the multi-key needle task of RULER (Hsieh et al., arXiv 2404.06654). All questions of a
context follow one another, each with its right answer, and the model reads the whole in one pass
(teacher forcing): so the rows that retrieve go through the approximation like all others. Decoding
token by token would not show it: short runs of queries on small caches stay exact
(`Method.reason_for_exact`). As anywhere in that pass, which blocks a method that selects for many
rows at once computes exactly can depend on later rows, here on answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate.logits import RowOutputs
from mra_cli.evaluate.scores import Measure
from mra_cli.inputs import Samples, position_limit, special_tokens

NEEDLES = 10
"""Facts per context."""

_WORDS = """
    apple river candle market silver garden window basket copper hammer meadow pencil rocket
    saddle tunnel velvet walnut anchor barrel cactus dragon engine falcon guitar harbor island
    jacket kettle ladder magnet needle orchid pepper quartz ribbon spider teapot umbrella
    violin
""".split()  # noqa: SIM905 - forty quoted words
_FACT = "\n\nThe special magic number for {word} is {number}. Remember it.\n\n"
_QUESTION = (
    "\n\nQuestion: What is the special magic number for {word}?\n"
    "Answer: The special magic number for {word} is"
)


@dataclass(frozen=True, eq=False)
class Context:
    """One text with its questions and answers.

    Attributes:
        ids: Tokens ``[1, N]``.
        digits: Places of the answers' digits, by answer.
    """

    ids: Tensor
    digits: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model made of the digits: their negative log-likelihoods in nats, and whether each
    was its first choice; by answer."""

    losses: tuple[tuple[float, ...], ...]
    right: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, eq=False)
class Needles:
    """The task, see above; `make` makes it."""

    checkpoint: Checkpoint
    contexts: tuple[Context, ...]

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        samples: Samples,
        text: str,
        length: int | None,
        count: int,
        seed: int,
    ) -> Needles:
        """``count`` contexts of ``length`` tokens, each with its own facts and piece of the text.

        Raises:
            InputError: Not a causal language model, or the text or the length is too short.
        """
        model = checkpoint.model
        causal = model.can_generate() and not model.config.is_encoder_decoder
        if not causal or model.main_input_name != "input_ids" or checkpoint.tokenizer is None:
            raise InputError(
                f"the task needles is for causal language models; {checkpoint.name} is "
                f"{type(model).__name__}; leave it out"
            )
        length = length or samples.length
        limit = position_limit(checkpoint)
        if limit is not None and length > limit:
            raise InputError(f"{checkpoint.name} has {limit} positions, got needles:{length}")
        hay = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
        made = [
            _context(checkpoint, hay, length, random.Random(f"{seed}/{i}")) for i in range(count)
        ]
        return cls(checkpoint, tuple(made))

    @property
    def name(self) -> str:
        return f"needles in {self.contexts[0].ids.shape[1]} tokens"

    @property
    def items(self) -> int:
        return sum(len(context.digits) for context in self.contexts)

    @torch.no_grad()
    def run(self) -> Answers:
        outputs = RowOutputs(self.checkpoint.model, {"input_ids": self.contexts[0].ids})
        losses, right = [], []
        for context in self.contexts:
            rows = outputs({"input_ids": context.ids, "use_cache": False})
            for places in context.digits:
                at = torch.tensor(places, device=rows.device)
                truth = context.ids[0, at]
                logits = outputs.logits(rows[at - 1])
                picked = logits.log_softmax(-1).gather(1, truth[:, None])[:, 0]
                losses.append(tuple((-picked).tolist()))
                right.append(tuple((logits.argmax(-1) == truth).tolist()))
        return Answers(tuple(losses), tuple(right))

    def measures(self, exact: Answers, run: Answers) -> tuple[Measure, ...]:
        def of(name: str, figure: str, **kind: bool) -> Measure:
            return Measure(name, _SCORES[figure](exact), _SCORES[figure](run), **kind)

        return (
            of("answer NLL, nats per digit", "loss", higher_is_better=False),
            of("digits right", "digits", percent=True),
            of("answers right", "answers", percent=True),
        )


_SCORES = {
    "loss": lambda got: _mean([x for answer in got.losses for x in answer]),
    "digits": lambda got: _mean([x for answer in got.right for x in answer]),
    "answers": lambda got: _mean([all(answer) for answer in got.right]),
}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _context(checkpoint: Checkpoint, hay: list[int], length: int, chance: random.Random) -> Context:
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    words = chance.sample(_WORDS, NEEDLES)
    numbers = {word: str(chance.randint(10000, 99999)) for word in words}
    facts = [tokens(_FACT.format(word=word, number=numbers[word])) for word in words]
    asked = chance.sample(words, NEEDLES)
    tail: list[int] = []
    places: list[list[int]] = []
    for word in asked:
        tail += tokens(_QUESTION.format(word=word))
        answer = tokens(f" {numbers[word]}")
        is_digit = [_has_digit(tokenizer.decode([token])) for token in answer]
        if not any(is_digit):
            raise InputError(
                f"the task needles is for tokenizers that can spell numbers; that of "
                f"{checkpoint.name} has no digits; leave it out"
            )
        places.append([len(tail) + i for i, yes in enumerate(is_digit) if yes])
        tail += answer
    before, _ = special_tokens(tokenizer)
    room = length - len(before) - len(tail) - sum(map(len, facts))
    if not NEEDLES <= room <= len(hay):
        raise InputError(
            f"needles:{length} must leave room for {NEEDLES} facts and questions and be filled by "
            f"the text: its haystack is {room} tokens, the text has {len(hay)}; "
            + ("use a longer text" if room > len(hay) else f"use at least {length - room + 256}")
        )
    start = chance.randrange(len(hay) - room + 1)
    hay, ids, done = hay[start : start + room], list(before), 0
    for number, fact in enumerate(facts):
        cut = int(room * (number + 0.5) / NEEDLES)
        ids += hay[done:cut] + fact
        done = cut
    ids += hay[done:]
    digits = tuple(tuple(len(ids) + i for i in found) for found in places)
    return Context(torch.tensor([ids + tail], device=checkpoint.device), digits)


def _has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)
