"""Is a patched checkpoint what it says? Its files, its answers in a fresh process, its figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mra_cli.checkpoint import Checkpoint, load_checkpoint
from mra_cli.errors import InputError
from mra_cli.export import CARD_FILE, PLAN_FILE
from mra_cli.figures import Figures, measure
from mra_cli.fresh import Run, answers
from mra_cli.inputs import DEFAULT_TEXT_NAME, Samples, dry_run, make_samples, read_text
from mra_cli.loading import load, plan_of
from mra_cli.manifest import read_manifest
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.remote import CONFIG_KEY
from mra_cli.report import read_plan
from mra_cli.runtime import code_files
from mra_cli.sites import output_tensors
from mra_cli.staging import MARK, sha256

ERROR_TOLERANCE = 0.01
"""How far an error, a cosine or a share may be from the card's, absolutely; perplexities
relatively. Other machines round otherwise, and near-ties among blocks then fall otherwise."""

CARD = "figures of the card"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: Whether it is as it should be; None: it could not be told.
        detail: What was found.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All that `verify` looked at.

    Attributes:
        path: The patched checkpoint.
        checks: In the order of the looking.
        figures: What was measured now; None if not fit to measure.
    """

    path: str
    checks: tuple[Check, ...]
    figures: Figures | None

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps({**asdict(self), "ok": not self.failed}, indent=2)


def verify(
    path: Path,
    *,
    min_recovery: float | None = None,
    text: Path | None = None,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Check a patched checkpoint.

    Args:
        path: Its directory.
        min_recovery: Least recovery (see `Damage.recovery`) that passes.
        text: What the card's figures were measured on, if not the default text.
        trust_remote_code: Run the code in the directory even if another version wrote it.

    Raises:
        CheckpointError: No patched checkpoint.
        InputError: ``min_recovery`` is not in (0, 1].
    """
    if min_recovery is not None and not 0.0 < min_recovery <= 1.0:
        raise InputError(f"--min-recovery must be in (0, 1], got {min_recovery}")
    manifest = read_manifest(path)
    content = None if text is None else read_text(text)
    checks = [_files(path, manifest)]
    if checks[0].passed is False:
        return VerifyReport(str(path), tuple(checks), None)  # what is not whole is not run
    checks.append(_code(path, trust_remote_code))
    checkpoint = load_checkpoint(str(path))
    plan = plan_of(checkpoint.model.config, str(path))
    checks.append(_same_plan(path, plan))
    card = manifest["figures"] and Figures.from_dict(manifest["figures"])
    samples: Samples | None
    wanted = {} if card is None else {"count": card.samples, "seed": card.seed}
    if card is not None and card.seq_len:
        wanted["seq_len"] = card.seq_len
    try:
        samples = make_samples(
            checkpoint,
            text=content,
            text_name=DEFAULT_TEXT_NAME if text is None else str(text),
            **wanted,
        )
        batch = samples.batches[0]
    except InputError as error:
        if card is not None or min_recovery is not None or text is not None:
            raise
        samples, batch = None, dry_run(checkpoint)  # no tokenizer, say
        checks.append(Check(CARD, None, str(error)))
    if checks[1].passed:
        checks += _reloaded(path, checkpoint, plan, batch)
    if samples is None:
        return VerifyReport(str(path), tuple(checks), None)
    figures = measure(checkpoint, samples, plan, wanted.get("seed", 0))
    checks.append(_figures(card, figures))
    if min_recovery is not None:
        recovery = figures.damage.recovery
        enough = recovery >= min_recovery
        checks.append(Check("recovery", enough, f"{recovery:.4f}, at least {min_recovery:g} asked"))
    return VerifyReport(str(path), tuple(checks), figures)


def _files(path: Path, manifest: dict[str, Any]) -> Check:
    listed = manifest["files"]
    there = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - there)]
    wrong += [f"{name} is not listed" for name in sorted(there - listed.keys() - {MARK, CARD_FILE})]
    unread = 0
    for name in sorted(listed.keys() & there):
        file, entry = path / name, listed[name]
        if name == CARD_FILE:  # yours to edit
            continue
        unread += entry["sha256"] is None
        if file.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
        elif entry["sha256"] is not None and sha256(file) != entry["sha256"]:
            wrong.append(f"{name} has changed")
    if wrong:
        return Check("files", False, "; ".join(wrong[:3]) + (" ..." if wrong[3:] else ""))
    note = f" ({unread} linked by size alone)" if unread else ""
    return Check("files", True, f"{len(listed)} as the manifest says{note}")


def _code(path: Path, trusted: bool) -> Check:
    ours = code_files()
    foreign = [name for name, text in ours.items() if (path / name).read_text("utf-8") != text]
    if not foreign:
        return Check("code", True, "this version's own")
    if trusted:
        return Check("code", True, f"{', '.join(foreign)} of another version, trusted")
    return Check(
        "code",
        False,
        f"{', '.join(foreign)} differ from this version's and were not run; patch again, or read "
        "them and pass --trust-remote-code",
    )


def _same_plan(path: Path, plan: Plan) -> Check:
    same = read_plan(path / PLAN_FILE, None) == plan
    detail = f"{len(plan.sites)} sites" if same else f"{PLAN_FILE} differs from config.json's plan"
    return Check("plan", same, detail)


@torch.no_grad()
def _reloaded(
    path: Path, checkpoint: Checkpoint, plan: Plan, batch: dict[str, Tensor]
) -> list[Check]:
    """The model's answers as loaded by transformers alone, against those in this process."""
    model = checkpoint.model
    exact = output_tensors(model(**batch))
    with patched(model, plan):
        approximated = output_tensors(model(**batch))
    with patched(model, plan.with_impl("reference")):  # what a checkpoint carries
        reference = output_tensors(model(**batch))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    classes = {v.removeprefix("modeling_mra."): k for k, v in config["auto_map"].items()}
    run = Run(path, classes[type(model).__name__], batch, {"trust_remote_code": True})
    # Strict checkpoints give the exact model only to those who ask for it.
    untrusted = {"attn_implementation": "sdpa"} if config[CONFIG_KEY].get("strict") else {}
    fresh = answers({"patched": run, "exact": replace(run, options=untrusted)})
    loaded = output_tensors(load(path).eval()(**batch))
    return [
        _compare("fresh process, without mra-cli", fresh["patched"], reference),
        _compare("fresh process, without trust: exact", fresh["exact"], exact),
        _compare("mra_cli.load", loaded, approximated),
    ]


def _compare(name: str, given: list[Tensor] | str, expected: list[Tensor]) -> Check:
    if isinstance(given, str):
        return Check(name, False, given)
    if len(given) != len(expected):
        return Check(name, False, f"{len(given)} outputs instead of {len(expected)}")
    if all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)):
        return Check(name, True, "bit-identical")
    far = max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))
        for a, b in zip(given, expected, strict=True)
    )
    return Check(name, False, f"outputs differ by {far:.2g}")


def _figures(card: Figures | None, now: Figures) -> Check:
    if card is None:
        return Check(CARD, None, "the card has none")
    if card.digest != now.digest:
        return Check(CARD, None, f"measured on another text ({card.inputs}); give it by --text")
    pairs = {
        f"error at {a.site}": (a.error, b.error)
        for a, b in zip(card.sites, now.sites, strict=False)
    }
    for field, value in asdict(card.damage).items():
        other = getattr(now.damage, field)
        if value is not None and other is not None:
            pairs[field] = (value, other)
    off = {key: pair for key, pair in pairs.items() if abs(pair[0] - pair[1]) > ERROR_TOLERANCE}
    if len(card.sites) != len(now.sites) or off:
        key, (then, fresh) = next(iter(off.items()), ("sites", (len(card.sites), len(now.sites))))
        return Check(CARD, False, f"{key} is {fresh:.4f} now, the card says {then:.4f}")
    return Check(CARD, True, f"{len(pairs)} within {ERROR_TOLERANCE:g}")
