"""Which method runs at which attention site: the thing `analyze` tries and `patch` writes down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mra_cli.errors import InputError
from mra_cli.methods import Method, make_method
from mra_cli.sites import Site

SCHEMA = 1


@dataclass(frozen=True)
class SitePlan:
    """One line of a plan.

    Attributes:
        method: What runs there.
        is_cross: The site's keys come from another sequence.
        grid: Rows and columns of image patches if the site's tokens form an image.
    """

    method: Method
    is_cross: bool = False
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """What runs where, by the qualified name of the attention module; others stay exact."""

    sites: Mapping[str, SitePlan]

    @classmethod
    def uniform(cls, sites: Iterable[Site], method: Method) -> Plan:
        """The same method at every site that can be patched."""
        return cls(
            {
                site.name: SitePlan(method, site.is_cross, site.grid)
                for site in sites
                if site.verdict == "patch"
            }
        )

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        sites = {
            name: {"is_cross": site.is_cross, "grid": site.grid, **site.method.settings()}
            for name, site in self.sites.items()
        }
        return json.dumps({"schema": SCHEMA, "sites": sites}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in ``text``.

        Raises:
            InputError: Not a plan, or one of a later version.
        """
        try:
            data = json.loads(text)
            schema, sites = data["schema"], dict(data["sites"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"a plan must be JSON with 'schema' and 'sites'; got {error}"
            ) from error
        if schema != SCHEMA:
            raise InputError(f"plan schema must be {SCHEMA}, got {schema}; update mra-cli")
        return cls({name: _site_plan(name, entry) for name, entry in sites.items()})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """The plan in a file."""
        try:
            return cls.from_json(path.read_text())
        except OSError as error:
            raise InputError(f"can't read the plan {path}: {error.strerror}") from error


def _site_plan(name: str, entry: Any) -> SitePlan:
    if not isinstance(entry, dict) or not {"method", "budget"} <= entry.keys():
        raise InputError(f"plan entry {name} must have 'method' and 'budget'; got {entry!r}")
    rest = {key: value for key, value in entry.items() if value is not None}
    name, budget = rest.pop("method"), rest.pop("budget")
    cross, grid = bool(rest.pop("is_cross", False)), rest.pop("grid", None)
    return SitePlan(make_method(name, budget, rest), cross, tuple(grid) if grid else None)
