"""Write a patched checkpoint: the source's own files, plus a plan and the code that runs it."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import PreTrainedModel

from mra_cli import __version__
from mra_cli.analyze import choose_sites
from mra_cli.card import model_card
from mra_cli.checkpoint import Checkpoint, load_checkpoint, sketch_checkpoint
from mra_cli.errors import CheckpointError, ExportError, InputError, UnsupportedModelError
from mra_cli.figures import Figures
from mra_cli.figures import measure as measure_plan
from mra_cli.files import DEMOS, Listing, list_files, locate, stamps, weight_bytes
from mra_cli.host import auto_classes
from mra_cli.inputs import DEFAULT_TEXT_NAME, dry_run, make_samples, position_limit
from mra_cli.methods import Method, check_model, fitting_sites
from mra_cli.plan import Plan
from mra_cli.remote import CONFIG_KEY, write_strict
from mra_cli.runtime import code_files, implementation_name
from mra_cli.sites import Site, find_sites, sketch_sites
from mra_cli.staging import MARK, Mode, place, sha256, staged

SCHEMA = 1

PLAN_FILE, CARD_FILE = "mra_plan.json", "README.md"

MOST_MEASURED_BYTES = 4 << 30
"""Weights up to this size are run to measure a plan; bigger ones if it is asked for."""

HASHED_BYTES = 256 << 20
"""Linked weights up to this size are hashed for the manifest; reading more would take longer than
all else. Copies always are."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A source and what is to be done to it; nothing is written yet.

    Attributes:
        checkpoint: The source; on torch's meta device if only laid out (see `sketch_checkpoint`).
        path: Its directory or GGUF file.
        sites: Its attention sites.
        plan: What runs at them.
        stamps: State of its files before they were read.
        allow_pickle: Pickled weights may be taken over.
    """

    checkpoint: Checkpoint
    path: Path
    sites: list[Site]
    plan: Plan
    stamps: dict[Path, tuple[int, int, int]]
    allow_pickle: bool

    @property
    def has_weights(self) -> bool:
        """The model can be run, not only laid out."""
        return self.checkpoint.device.type != "meta"


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


def prepare(
    name: str,
    *,
    method: Method,
    layers: str | None = None,
    plan: Plan | None = None,
    min_length: int | None = None,
    measure: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Prepared:
    """Load the source (or lay it out without its weights) and settle the plan.

    Args:
        name: As for `load_checkpoint`.
        method: What runs at the sites, unless ``plan`` says.
        layers: Which sites, see `choose_sites`; None: all that can be patched.
        plan: What runs where.
        min_length: Exact over fewer keys; None: as the plan says.
        measure: Load weights of any size, not only up to `MOST_MEASURED_BYTES`.

    Raises:
        CheckpointError: See `load_checkpoint`; or the source brings its own model code.
        UnsupportedModelError: No site can be patched.
        InputError: Layers or plan don't fit the model.
    """
    path = _source_path(name)
    before = stamps(path)
    if measure or path.is_file() or weight_bytes(path) <= MOST_MEASURED_BYTES:
        checkpoint = load_checkpoint(
            str(path),
            dtype="bfloat16" if path.is_file() else None,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        _check_native(checkpoint.model, name)
        sites = find_sites(checkpoint.model, dry_run(checkpoint))
    else:
        checkpoint = sketch_checkpoint(path)
        sites = sketch_sites(checkpoint.model, dry_run(checkpoint))
    checkpoint = Checkpoint(
        name, checkpoint.model, checkpoint.tokenizer, path, checkpoint.fingerprint
    )
    if plan is None:
        plan = Plan.uniform(fitting_sites(method, choose_sites(sites, layers)), method)
    _check_plan(plan, checkpoint, sites)
    if min_length is not None:
        plan = plan.with_min_length(min_length)
    return Prepared(checkpoint, path, sites, plan, before, allow_pickle)


def figures(
    prepared: Prepared,
    *,
    measure: bool | None = None,
    text: str | None = None,
    text_name: str | None = None,
    seq_len: int | None = None,
    samples: int = 2,
    seed: int = 0,
) -> tuple[Figures | None, str]:
    """What the plan does to the model, for its card; or None, and why not.

    Args:
        measure: True: measure or fail; False: don't; None: where it can be done.
        text, text_name, seq_len, samples, seed: See `make_samples`; the length is at most 512 if
            not said.
    """
    if measure is False:
        return None, "not asked for"
    if not prepared.has_weights:
        return None, f"the weights are over {MOST_MEASURED_BYTES >> 30} GiB; --measure runs them"
    checkpoint = prepared.checkpoint
    if seq_len is None and checkpoint.model.main_input_name == "input_ids":
        seq_len = min(512, position_limit(checkpoint) or 512)
    try:
        made = make_samples(
            checkpoint,
            text=text,
            text_name=text_name or DEFAULT_TEXT_NAME,
            seq_len=seq_len,
            count=samples,
            seed=seed,
        )
        return measure_plan(checkpoint, made, prepared.plan, seed), ""
    except InputError as error:
        if measure or text is not None:
            raise
        return None, str(error)


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
    manifest: dict[str, Any] = {}
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
                if digest is not None:
                    manifest[relative.as_posix()] = digest
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
            model_card(original, prepared.plan, figures, public_name(prepared), strict=strict),
            encoding="utf-8",
        )
        _write_manifest(part, prepared, figures, manifest, set(linked))
    return Exported(
        target,
        len(prepared.plan.sites),
        tuple(linked),
        tuple(copied),
        tuple(str(file) for file in listing.left_out if not _is_ours(file)),
        time.perf_counter() - started,
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a patched checkpoint.

    Raises:
        CheckpointError: There is none, or it can't be read.
    """
    try:
        manifest = json.loads((path / MARK).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path / MARK} must have schema {SCHEMA}, got {manifest['schema']}; update mra-cli"
            )
        names, _ = manifest["files"].keys(), manifest["figures"]
        outside = [name for name in names if Path(name).is_absolute() or ".." in name]
        if outside:
            raise ValueError(f"files outside the directory, {outside[0]}")
        return dict(manifest)
    except OSError as error:
        raise CheckpointError(
            f"DIR must be a patched checkpoint, and {path} has no {MARK}; make one with: "
            "mra-cli patch MODEL --out DIR"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MARK} is damaged ({error}); patch again") from error


def public_name(prepared: Prepared) -> str:
    """What to call the source in files that travel: a hub id, or a name without its folder."""
    name = prepared.checkpoint.name
    demo = DEMOS.get(name.removeprefix("demo:")) if name.startswith("demo:") else None
    if demo is not None:
        return demo.hub_id
    return name if locate(name) is None else prepared.path.name


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


def _source_path(name: str) -> Path:
    path = locate(name)
    if path is not None:
        return path
    if name.startswith("demo:"):
        load_checkpoint(name)  # says which package to install
    skipped = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.py"]
    try:
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=skipped))
    except Exception as error:  # the hub's and the network's dozen types
        raise CheckpointError(
            f"no such model: {name}: no directory of this name, and the hub did not give one "
            "(wrong name, private, or no network)"
        ) from error


def _check_native(model: PreTrainedModel, name: str) -> None:
    if not type(model).__module__.startswith("transformers."):
        raise UnsupportedModelError(
            f"{name} must be of a class of transformers to be patched on disk, got "
            f"{type(model).__name__} of its own code; in Python, mra_cli.patching.patched takes it"
        )


def _check_plan(plan: Plan, checkpoint: Checkpoint, sites: list[Site]) -> None:
    model = checkpoint.model
    if not plan.sites:
        raise InputError("a plan must name at least one attention site, got none")
    modules = dict(model.named_modules())
    known = {site.name: site for site in sites}
    # What takes no part in a run on text alone (the picture's part of it) can't be told here.
    parts = [getattr(model.config, key, None) for key in model.config.sub_configs or ()]
    several = sum(part is not None for part in parts) > 1
    for name, entry in plan.sites.items():
        check_model(entry.method, checkpoint.fingerprint)
        if entry.method.about.calibrated:
            raise InputError(
                f"a patched checkpoint can't carry the calibration of {entry.method.name} (site "
                f"{name}); use another method there, or mra_cli.patching.patched in Python"
            )
        if name in known:
            fitting_sites(entry.method, [known[name]])
            if known[name].verdict == "refused":
                raise InputError(f"the plan's site {name} can't be patched: {known[name].reason}")
        elif not several or name not in modules:
            raise InputError(
                f"the plan must name attention sites of {type(model).__name__}, which has no "
                f"{name}; see them with: mra-cli check MODEL"
            )


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


def _write_manifest(
    part: Path,
    prepared: Prepared,
    figures: Figures | None,
    digests: dict[str, str],
    linked: set[str],
) -> None:
    files = {}
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        name, size = path.relative_to(part).as_posix(), path.stat().st_size
        big = name in linked and size > HASHED_BYTES
        fresh = name not in digests or name in ("config.json", CARD_FILE)
        digest = None if big else sha256(path) if fresh else digests[name]
        files[name] = {"bytes": size, "sha256": digest}
    manifest = {
        "schema": SCHEMA,
        "source": {
            "name": public_name(prepared),
            "fingerprint": prepared.checkpoint.fingerprint,
            "class": type(prepared.checkpoint.model).__name__,
        },
        "versions": {
            "mra_cli": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "implementation": implementation_name(),
        "figures": None if figures is None else figures.to_dict(),
        "files": files,
    }
    (part / MARK).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
