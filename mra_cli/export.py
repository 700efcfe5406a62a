"""Write a patched checkpoint: the source's own files, plus a plan and the code that runs it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mra_cli.card import model_card
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import ExportError
from mra_cli.figures import Figures
from mra_cli.files import Listing, list_files, stamps
from mra_cli.host import auto_classes
from mra_cli.manifest import write_manifest
from mra_cli.prepare import Prepared
from mra_cli.remote import CONFIG_KEY, write_strict
from mra_cli.runtime import code_files, implementation_name
from mra_cli.staging import MARK, Mode, place, staged

PLAN_FILE, CARD_FILE = "mra_plan.json", "README.md"

_REWRITTEN = "config.json", CARD_FILE
"""Files of the source that say something else once it is patched."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The patched checkpoint.
        sites: Patched attention sites.
        linked, copied: Files by how they came there.
        left_out: Files of the source that were not taken over.
        seconds: Wall time of writing.
    """

    path: Path
    sites: int
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float


def export(
    prepared: Prepared,
    target: Path,
    figures: Figures | None,
    *,
    strict: bool = False,
    mode: Mode = "auto",
    force: bool = False,
) -> Exported:
    """Write the patched checkpoint, complete or not at all.

    Args:
        target: Where, as `staging.check_target` returns it.
        figures: What `figures.measure` found; None: not measured, and the card says so.
        strict: Without the plan's code, loading fails instead of giving the exact model.
        mode: Link or copy the weights.
        force: Replace a patched checkpoint of that name.

    Raises:
        ExportError: It can't be written, or the source has changed since it was read.
    """
    started = time.perf_counter()
    check_apart(prepared.path, target)
    linked: list[str] = []
    copied: list[str] = []
    digests: dict[str, str] = {}
    with staged(target, force=force) as part:
        if prepared.path.is_file():
            listing = Listing((), (), ())
            _save_dequantised(prepared.checkpoint, part)
        else:
            listing = list_files(prepared.path, allow_pickle=prepared.allow_pickle)
            for relative in (*listing.weights, *listing.texts):
                if _is_ours(relative):
                    continue
                how: Mode = mode if relative in listing.weights else "copy"
                is_link, digest = place(prepared.path / relative, part / relative, how)
                (linked if is_link else copied).append(relative.as_posix())
                if digest is not None and relative.as_posix() not in _REWRITTEN:
                    digests[relative.as_posix()] = digest
        if stamps(prepared.path) != prepared.stamps:
            raise ExportError(
                f"{prepared.path} must not change while it is patched, and did; run this again"
            )
        _write_config(part, prepared, strict)
        (part / PLAN_FILE).write_text(prepared.plan.to_json() + "\n", encoding="utf-8")
        for file, text in code_files().items():
            (part / file).write_text(text, encoding="utf-8")
        card = part / CARD_FILE
        original = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
        card.write_text(
            model_card(original, prepared.plan, figures, prepared.public_name, strict=strict),
            encoding="utf-8",
        )
        write_manifest(part, prepared, figures, digests, set(linked))
    return Exported(
        target,
        len(prepared.plan.sites),
        tuple(linked),
        tuple(copied),
        tuple(str(file) for file in listing.left_out if not _is_ours(file)),
        time.perf_counter() - started,
    )


def check_apart(source: Path, target: Path) -> None:
    """Refuse a target that is the source, or inside it, or around it.

    Raises:
        ExportError: It is.
    """
    source = source.resolve()
    if source.is_file():  # a GGUF file may well lie beside what becomes of it
        return
    if target == source or source in target.parents or target in source.parents:
        raise ExportError(f"--out must be apart from the source {source}, got {target}")


def _save_dequantised(checkpoint: Checkpoint, part: Path) -> None:
    checkpoint.model.save_pretrained(part)
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save_pretrained(part)


def _is_ours(relative: Path) -> bool:
    """A file that a patched checkpoint has of us, should the source be one."""
    return str(relative) in (*code_files(), PLAN_FILE, MARK)


def _write_config(part: Path, prepared: Prepared, strict: bool) -> None:
    path = part / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    _drop_implementations(config)
    config[CONFIG_KEY] = {
        "implementation": implementation_name(),
        "strict": strict,
        "plan": prepared.plan.to_dict(),
    }
    # What the source mapped to code of its own is served by transformers' own classes.
    classes = auto_classes(prepared.checkpoint.model.config)
    config["auto_map"] = {auto: f"modeling_mra.{name}" for auto, name in classes.items()}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if strict:
        write_strict(path, implementation_name())


def _drop_implementations(config: Any) -> None:
    """Forget the attention implementations a config was saved with: they would win over ours."""
    if isinstance(config, dict):
        for key in [k for k in config if re.fullmatch("_?attn_implementation(_.*)?", k)]:
            del config[key]
        for value in config.values():
            _drop_implementations(value)
