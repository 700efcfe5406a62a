"""Which method runs at which attention site: the thing `analyze` tries and `patch` writes down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.methods import Method, make_method, with_impl
from mra_kernels import Impl

if TYPE_CHECKING:
    from mra_cli.sites import Site

SCHEMA = 1


@dataclass(frozen=True)
class SitePlan:
    """One line of a plan.

    Attributes:
        method: What runs there.
        is_cross: The site's keys come from another sequence.
        grid: Rows and columns of image patches if the site's tokens form an image.
        min_length: Calls over fewer keys than this stay exact (break-even length).
    """

    method: Method
    is_cross: bool = False
    grid: tuple[int, int] | None = None
    min_length: int = 0

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call stays exact; None: the method takes it."""
        if call.n_keys < self.min_length:
            return f"{call.n_keys} keys are fewer than the plan's min_length ({self.min_length})"
        return self.method.reason_for_exact(call)


@dataclass(frozen=True)
class Plan:
    """What runs where, by the qualified name of the attention module; others stay exact."""

    sites: Mapping[str, SitePlan]

    @classmethod
    def uniform(cls, sites: Iterable[Site], method: Method) -> Plan:
        """The same method at every site that can be patched and is of a kind that it serves."""
        return cls(
            {
                site.name: SitePlan(method.at(site.name), site.is_cross, site.grid)
                for site in sites
                if site.verdict == "patch" and site.kind in method.about.patterns
            }
        )

    def with_min_length(self, min_length: int) -> Plan:
        """The same plan, exact over fewer keys than ``min_length``."""
        return Plan({n: replace(site, min_length=min_length) for n, site in self.sites.items()})

    def with_impl(self, impl: Impl) -> Plan:
        """The same plan, computed by one implementation (see `mra_attention`) alone; methods that
        have but one stay as they are."""
        return Plan(
            {
                name: replace(site, method=with_impl(site.method, impl))
                if hasattr(site.method, "impl")
                else site
                for name, site in self.sites.items()
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` reads them back."""
        sites = {
            name: {
                "is_cross": site.is_cross,
                "grid": None if site.grid is None else list(site.grid),
                "min_length": site.min_length,
                **site.method.settings(),
            }
            for name, site in self.sites.items()
        }
        return {"schema": SCHEMA, "sites": sites}

    def to_json(self) -> str:
        """JSON text of `to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that `to_dict` gave.

        Raises:
            InputError: Not a plan, or one of a later version.
        """
        try:
            schema, sites = data["schema"], dict(data["sites"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"a plan must be JSON with 'schema' and 'sites'; got {type(data).__name__} "
                f"({error}); make one with: mra-cli patch MODEL --dry-run --json plan.json"
            ) from error
        if schema != SCHEMA:
            raise InputError(f"plan schema must be {SCHEMA}, got {schema}; update mra-cli")
        return cls({name: _site_plan(name, entry) for name, entry in sites.items()})


def _site_plan(site: str, entry: Any) -> SitePlan:
    if not isinstance(entry, dict) or not {"method", "budget"} <= entry.keys():
        raise InputError(f"plan entry {site} must have 'method' and 'budget'; got {entry!r}")
    rest = {key: value for key, value in entry.items() if value is not None}
    name, budget = rest.pop("method"), rest.pop("budget")
    cross, grid = rest.pop("is_cross", False), rest.pop("grid", None)
    min_length = rest.pop("min_length", 0)
    plain = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    plain &= isinstance(min_length, int) and min_length >= 0
    whole = grid is None or (len(grid) == 2 and all(isinstance(x, int) and x > 0 for x in grid))
    if not (plain and whole and isinstance(name, str) and isinstance(cross, bool)):
        raise InputError(
            f"plan entry {site} must have a method name, a number for 'budget', true or false for "
            f"'is_cross', two lengths or null for 'grid' and a length for 'min_length'; got {entry}"
        )
    try:
        method = make_method(name, budget, rest).at(site)
    except (InputError, TypeError) as error:
        raise InputError(f"plan entry {site}: {error}") from error
    return SitePlan(method, cross, tuple(grid) if grid else None, min_length)
