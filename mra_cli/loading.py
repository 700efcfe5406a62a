"""Patched checkpoints in use: loaded without remote code, and run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint, load_checkpoint, native_class
from mra_cli.errors import CheckpointError, InputError
from mra_cli.files import locate
from mra_cli.patching import answer, intercepted
from mra_cli.plan import Plan, SitePlan
from mra_cli.remote import CONFIG_KEY, model_class, read_entry
from mra_cli.runtime import code_files


def load(name: str | Path, **options: Any) -> PreTrainedModel:
    """The model of a patched checkpoint, patched, by this package's code and none of its own.

    Args:
        name: Directory (or hub id) of a patched checkpoint.
        options: For ``from_pretrained``; ``attn_implementation="sdpa"`` gives the exact model.

    Raises:
        CheckpointError: No patched checkpoint.
    """
    where = locate(str(name)) or str(name)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"can't load {name}: {' '.join(str(error).split())[:200]}; give a directory that "
            "mra-cli patch made"
        ) from error
    plan_of(config, str(name))
    base = native_class(config)
    if base is None:
        raise CheckpointError(
            f"{name} must name a class of transformers in its config's 'architectures', got "
            f"{config.architectures}; patch it again"
        )
    patched: Any = model_class(base, __name__, code_files)
    model: PreTrainedModel = patched.from_pretrained(where, **options)
    return model


def plan_of(config: Any, name: str) -> Plan:
    """The plan in a patched checkpoint's config.

    Raises:
        CheckpointError: It has none.
        InputError: It has one that can't be read.
    """
    entry = getattr(config, CONFIG_KEY, None)
    if entry is None:
        raise CheckpointError(
            f"{name} must be a patched checkpoint, and its config.json has no plan; make one with: "
            "mra-cli patch MODEL --out DIR"
        )
    return read_entry(entry)[1]


@dataclass(frozen=True)
class Answer:
    """What a patched model made of a prompt.

    Attributes:
        text: What a model that generates went on with; None for others.
        embedding: Mean-pooled last hidden state of a model that does not, as in `Damage`.
        tokens: Length of the prompt.
        approximated, calls: Attention calls at the plan's sites: approximated, and all.
        seconds: Wall time without loading.
    """

    text: str | None
    embedding: tuple[float, ...] | None
    tokens: int
    approximated: int
    calls: int
    seconds: float


@torch.no_grad()
def run(
    name: str, prompt: str, *, max_new_tokens: int = 64, chat: bool = False, device: str = "cpu"
) -> Answer:
    """Load a patched checkpoint and feed it a prompt; text is generated greedily.

    Raises:
        CheckpointError: No patched checkpoint.
        InputError: An empty prompt, or a model that takes no text.
    """
    checkpoint = load_checkpoint(name, device=device)
    plan = plan_of(checkpoint.model.config, name)
    batch = _tokens(checkpoint, prompt, chat)
    calls = {"approximated": 0, "calls": 0}

    def counted(site: SitePlan, call: AttentionCall) -> Tensor:
        calls["approximated"] += site.reason_for_exact(call) is None
        calls["calls"] += 1
        return answer(site, call)

    model, text, embedding = checkpoint.model, None, None
    started = time.perf_counter()
    with intercepted(model, plan.sites, counted):
        if model.can_generate():
            generator: Any = model
            ids = generator.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            if not model.config.is_encoder_decoder:
                ids = ids[:, batch["input_ids"].shape[1] :]
            assert checkpoint.tokenizer is not None
            text = checkpoint.tokenizer.decode(ids[0], skip_special_tokens=True)
        else:
            hidden = model.base_model(**batch).last_hidden_state
            embedding = tuple(hidden[0].float().mean(0).tolist())
    seconds = time.perf_counter() - started
    return Answer(text, embedding, batch["input_ids"].shape[1], seconds=seconds, **calls)


def _tokens(checkpoint: Checkpoint, prompt: str, chat: bool) -> dict[str, Tensor]:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None or checkpoint.model.main_input_name != "input_ids":
        raise InputError(
            f"run is for models that take text and have a tokenizer; {checkpoint.name} takes "
            f"{checkpoint.model.main_input_name}; in Python, use mra_cli.load"
        )
    if not prompt.strip():
        raise InputError("the prompt must not be empty; give a text to go on with")
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"{checkpoint.name} has no chat template; leave out --chat")
        message = [{"role": "user", "content": prompt}]
        prompt = str(
            tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    names = [key for key in ("input_ids", "attention_mask") if key in encoded]
    return {key: encoded[key].to(checkpoint.device) for key in names}
