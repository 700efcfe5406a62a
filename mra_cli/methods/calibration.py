"""What methods share that were fitted to one checkpoint: the file, and the site they serve."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.methods.base import Approximation
from mra_cli.methods.rows import Keep

CALIBRATION_SCHEMA = 1

CALIBRATION_KEY = "mra_calibration"
"""Entry of a safetensors file's metadata that holds all but the tensors, as JSON."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A file that `mra-cli calibrate` wrote.

    Attributes:
        path: Where it was read from.
        method: Name of the method.
        model: Name of the model, and its ``fingerprint`` (`Checkpoint.fingerprint`).
        length: Tokens per sample it was fitted on.
        options: Settings of the fit.
        sites: What was found, by site.
    """

    path: str
    method: str
    model: str
    fingerprint: str
    length: int
    options: dict[str, Any]
    sites: dict[str, dict[str, Any]]

    @lru_cache(maxsize=256)  # noqa: B019 - calibrations are cached themselves, and few
    def tensors(self, site: str) -> dict[str, Tensor]:
        """The fitted tensors of a site."""
        from safetensors import safe_open

        prefix = f"{site}|"
        with safe_open(self.path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_calibration(path: str) -> Calibration:
    """The calibration in a file; read once, and again when it changes.

    Raises:
        InputError: It is no such file.
    """
    file = Path(path).expanduser()
    try:
        state = file.stat()
    except OSError as error:
        raise InputError(
            f"can't read the calibration {path}: {error.strerror}; make it with: mra-cli calibrate "
            f"MODEL --method METHOD --out {path}"
        ) from error
    return _read_calibration(str(file), state.st_mtime_ns)


@lru_cache(maxsize=16)
def _read_calibration(path: str, changed: int) -> Calibration:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            data = json.loads((file.metadata() or {})[CALIBRATION_KEY])
        if data["schema"] != CALIBRATION_SCHEMA:
            raise InputError(
                f"the calibration {path} must have schema {CALIBRATION_SCHEMA}, got "
                f"{data['schema']}; calibrate again"
            )
        names = ("method", "model", "fingerprint", "length", "options", "sites")
        return Calibration(path, **{name: data[name] for name in names})
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{path} must be a calibration that mra-cli calibrate wrote, and is not "
            f"({type(error).__name__}: {error}); calibrate again"
        ) from error


C = TypeVar("C", bound="Calibrated")


@dataclass(frozen=True)
class Calibrated(Approximation):
    """A method that was fitted to each site of one checkpoint.

    Attributes:
        calibration: The file that `mra-cli calibrate` wrote.
        site: The site it runs at, see `at`.
    """

    hidden: ClassVar[tuple[str, ...]] = ("site",)

    calibration: str = ""
    site: str = ""

    def at(self: C, site: str) -> C:
        """The method as it was fitted at a site."""
        return dataclasses.replace(self, site=site)

    @property
    def source(self) -> Calibration:
        """The calibration.

        Raises:
            InputError: None was named, or it is of another method.
        """
        if not self.calibration:
            raise InputError(
                f"{self.name} has to be fitted to the model first: mra-cli calibrate MODEL "
                f"--method {self.name} --out FILE, then --set calibration=FILE"
            )
        found = read_calibration(self.calibration)
        if found.method != self.name:
            raise InputError(
                f"the calibration must be one of {self.name}, and {self.calibration} is of "
                f"{found.method}; use --method {found.method}"
            )
        return found

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The tensors of this site."""
        return self.source.tensors(self.site)

    @property
    def found(self) -> dict[str, Any]:
        """What the fit found at this site."""
        return self.source.sites[self.site]

    def reason_against_model(self, fingerprint: str) -> str | None:
        """Why it can't serve a model: none was named, or it was fitted to another."""
        try:
            source = self.source
        except InputError as error:
            return str(error)
        if source.fingerprint != fingerprint:
            return (
                f"{self.calibration} was fitted to {source.model} ({source.fingerprint}), and this "
                f"model is {fingerprint}; calibrate it, too"
            )
        return None

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call stays exact; None: the method takes it."""
        reason = super().reason_for_exact(call)
        if reason is None and self.site not in self.source.sites:
            reason = f"{self.calibration} has nothing for {self.site or 'an unnamed site'}"
        return reason


def band(window: int, first: int, offset: int) -> Keep:
    """Pairs that are always kept: keys near a row's own, and the first rows and keys.

    Args:
        window: Keys in all, centred on the row's own position.
        first: Tokens at the beginning.
        offset: Position of row 0 among the keys.
    """

    def keep(row: Tensor, key: Tensor) -> Tensor:
        own = row + offset
        near = (own - key).abs() <= window // 2 if window else torch.zeros_like(own == key)
        return near | (key < first) | (own < first)

    return keep


def nearest_point(curve: list[dict[str, Any]], budget: float) -> int:
    """The point of a curve whose density comes nearest to a budget."""
    return min(range(len(curve)), key=lambda at: abs(curve[at]["density"] - budget))
