"""What is to be patched and how, settled before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from transformers import PreTrainedModel

from mra_cli.analyze import choose_sites
from mra_cli.checkpoint import Checkpoint, load_checkpoint, sketch_checkpoint
from mra_cli.errors import CheckpointError, InputError, UnsupportedModelError
from mra_cli.figures import Figures
from mra_cli.figures import measure as measure_plan
from mra_cli.files import DEMOS, locate, stamps, weight_bytes
from mra_cli.inputs import DEFAULT_TEXT_NAME, dry_run, make_samples, position_limit
from mra_cli.methods import Method, check_model, fitting_sites
from mra_cli.plan import Plan
from mra_cli.sites import Site, find_sites, sketch_sites

MOST_MEASURED_BYTES = 4 << 30
"""Weights up to this size are run to measure a plan; bigger ones if it is asked for."""


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

    @property
    def public_name(self) -> str:
        """What to call the source in files that travel: a hub id, or a name without its folder."""
        name = self.checkpoint.name
        demo = DEMOS.get(name.removeprefix("demo:")) if name.startswith("demo:") else None
        if demo is not None:
            return demo.hub_id
        return name if locate(name) is None else self.path.name


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


def figures_of(
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
