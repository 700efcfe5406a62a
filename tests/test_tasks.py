"""Tasks and figures by text: what is asked, and what counts as right."""

from __future__ import annotations

import pytest
import torch
import transformers

from architectures import ARCHITECTURES
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate import Judge, make_task
from mra_cli.evaluate.transcripts import edits
from mra_cli.inputs import Samples, default_text, make_samples, probe
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.sites import find_sites
from mra_cli.texts import Text, read_texts, samples_of, split_samples


def tiny(name: str) -> Checkpoint:
    model = next(a for a in ARCHITECTURES if a.name == name).build()
    return Checkpoint(name, model, None, None, "none")


@pytest.mark.checkpoints
def test_needles_ask_for_every_number_and_score_its_digits(smollm2):
    samples = make_samples(smollm2, seq_len=64, count=1)
    task = make_task("needles:1024", smollm2, samples, default_text(), count=2, seed=0)
    assert task.name == "needles in 1024 tokens" and task.items == 20
    decode = smollm2.tokenizer.decode
    for context in task.contexts:
        assert context.ids.shape == (1, 1024)
        text = decode(context.ids[0])
        for places in context.digits:
            number = decode(context.ids[0, list(places)]).replace(" ", "")
            assert len(number) == 5 and number.isdecimal()
            assert text.count(f"is {number}. Remember it.") == 1, "told once"
            assert text.count(f"is {number}") == 2, "and asked for once"
    first, second = (context.ids for context in task.contexts)
    assert not torch.equal(first, second)
    again = make_task("needles:1024", smollm2, samples, default_text(), count=2, seed=0)
    assert torch.equal(again.contexts[1].ids, second)


@pytest.mark.checkpoints
def test_needles_are_lost_before_the_loss_shows_it(smollm2):
    """The rows that answer run approximated, and say so: a model that finds nearly all digits
    exactly misses many at a tenth of the scores."""
    samples = make_samples(smollm2, seq_len=256, count=1)
    task = make_task("needles:1024", smollm2, samples, default_text(), count=1, seed=1)
    sites = find_sites(smollm2.model, probe(samples))
    exact = task.run()
    assert all(m.exact == m.run for m in task.measures(exact, exact))
    with patched(smollm2.model, Plan.uniform(sites, make_method("mra2", 0.1))):
        loss, digits, _ = task.measures(exact, task.run())
    assert digits.exact > 0.85 > 0.6 > digits.run
    assert loss.run > 2 * loss.exact


@pytest.mark.checkpoints
def test_ranking_finds_the_next_passage(minilm):
    samples = make_samples(minilm, seq_len=128, count=1)
    text = default_text()[:60_000]
    task = make_task("ranking:128", minilm, samples, text, count=1, seed=0)
    cosines = task.run()
    assert cosines.shape == (task.items, task.items)
    found = {m.name: m for m in task.measures(cosines, cosines)}
    assert 2 / task.items < found["recall@1"].exact <= found["recall@5"].exact
    assert found["same first choice"].run == 1.0
    other = {m.name: m for m in task.measures(cosines, cosines.flip(1))}
    assert other["recall@1"].run < other["recall@1"].exact
    assert other["same first choice"].run < 0.5


def test_transcripts_of_the_same_model_are_the_same():
    checkpoint = tiny("whisper")
    known = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    checkpoint.model.generation_config = transformers.GenerationConfig(**known)
    samples = make_samples(checkpoint, count=2)
    task = make_task("transcript:12", checkpoint, samples, "", count=1, seed=0)
    first = task.run()
    assert len(first) == 2 and all(len(tokens) > 1 for tokens in first)
    same, changed = task.measures(first, task.run())
    assert (same.run, changed.run) == (1.0, 0.0)
    longer = [(*tokens, 7) for tokens in first]
    same, changed = task.measures(first, longer)
    assert same.run == 0.0
    assert changed.run == pytest.approx(2 / sum(map(len, first)))


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ((), (), 0),
        ((1, 2, 3), (1, 2, 3), 0),
        ((1, 2, 3), (1, 3), 1),
        ((1,), (2, 3), 2),
        ((), (4,), 1),
    ],
)
def test_edits(first, second, count):
    assert edits(first, second) == edits(second, first) == count


@pytest.mark.parametrize(
    ("spec", "name", "says"),
    [
        ("needle", "bert", "must be one of needles, ranking, transcript"),
        ("needles:many", "bert", "length in tokens"),
        ("needles:0", "bert", "length in tokens"),
        ("needles", "bert", "for causal language models"),
        ("ranking", "llama-gqa", "for encoders of texts"),
        ("transcript", "bert", "turn sounds into text"),
    ],
)
def test_tasks_that_a_model_cannot_do_are_refused(spec, name, says):
    checkpoint = tiny(name)
    ids = torch.randint(10, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    samples = Samples([{"input_ids": ids}], "random tokens", "none", 40)
    with pytest.raises(InputError, match=says):
        make_task(spec, checkpoint, samples, "words " * 99, count=1, seed=0)


@pytest.mark.checkpoints
def test_needles_that_do_not_fit_say_what_would(smollm2):
    samples = make_samples(smollm2, seq_len=64, count=1)
    for spec, says in (("needles:300", "use at least"), ("needles:8193", "has 8192 positions")):
        with pytest.raises(InputError, match=says):
            make_task(spec, smollm2, samples, default_text(), count=1, seed=0)
    with pytest.raises(InputError, match="use a longer text"):
        make_task("needles:2048", smollm2, samples, "too short", count=1, seed=0)


# --- texts -----------------------------------------------------------------------------------


def test_halves_share_nothing_and_lose_nothing():
    text = Text("it", "one\ntwo\nthree\nfour\n")
    first, second = text.halves()
    assert first.content + second.content == text.content
    assert first.content.endswith("\n") and second.content
    assert "".join(half.content for half in Text("it", "in a line").halves()) == "in a line"


def test_built_in_texts_are_long_and_different():
    helps, code = read_texts(["help", "code"])
    assert min(len(helps.content), len(code.content)) > 400_000
    assert code.content.count("\ndef ") > 100 > helps.content.count("\ndef ")
    assert [text.name for text in read_texts([])] == [helps.name]


@pytest.mark.checkpoints
def test_the_whole_is_the_mean_of_the_texts(minilm):
    texts = [Text("a", default_text()[:20_000]), Text("b", default_text()[-20_000:])]
    samples = samples_of(minilm, texts, seq_len=128, count=2, seed=0)
    assert samples.parts == (("a", 2), ("b", 2))
    judge = Judge(minilm.model, samples.batches, minilm.tokenizer)
    sites = find_sites(minilm.model, probe(samples))
    with patched(minilm.model, Plan.uniform(sites, make_method("mra2", 0.25))):
        whole, parts = judge.judge_parts([2, 2])
        assert judge.judge() == whole
        alone = judge.of_first().judge()
    assert whole.cosine_mean == pytest.approx(sum(part.cosine_mean for part in parts) / 2)
    assert whole.cosine_min == min(part.cosine_min for part in parts) < parts[0].cosine_mean
    assert alone.cosine_mean >= parts[0].cosine_min


@pytest.mark.checkpoints
def test_what_is_searched_on_is_not_what_is_verified_on(minilm):
    text = Text("mine", default_text()[:30_000])
    first, second = split_samples(minilm, [text], None, given=True, seq_len=64, count=3, seed=0)
    windows = [
        [tuple(b["input_ids"][0].tolist()) for b in side.batches] for side in (first, second)
    ]
    assert not set(windows[0]) & set(windows[1])
    with pytest.raises(InputError, match="in both"):
        split_samples(minilm, [text], [text], given=True, seq_len=64, count=1, seed=0)


def test_class_tokens_stand_for_pictures():
    """A vision model's embedding is its class token; patches can change all they like."""
    checkpoint = tiny("dinov2")
    samples = make_samples(checkpoint, count=1)
    judge = Judge(checkpoint.model, samples.batches, None)
    states = judge._exact[0]
    from mra_cli.evaluate.logits import embedding

    assert torch.equal(embedding(checkpoint.model, states), states[0].double())
    text = embedding(tiny("bert").model, states)
    assert torch.allclose(text, states.double().mean(0))
