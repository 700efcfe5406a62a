"""What a plan does to a model: figures that a patched checkpoint carries and `verify` checks."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint
from mra_cli.evaluate import Damage, Judge
from mra_cli.inputs import Samples
from mra_cli.measure import relative_error
from mra_cli.patching import intercepted, patched
from mra_cli.plan import Plan, SitePlan


@dataclass(frozen=True)
class SiteError:
    """One site under the plan, fed exactly.

    Attributes:
        site: Its name.
        error: Relative output error, mean over samples and heads.
        density: Fraction of the legal scores computed exactly.
    """

    site: str
    error: float
    density: float


@dataclass(frozen=True)
class Figures:
    """What a plan does, on which inputs.

    Attributes:
        inputs, digest, samples, seq_len, seed, synthetic: The inputs, as in `Samples`.
        sites: Sites that approximated anything at this length.
        damage: The whole model, approximated at all sites together.
    """

    inputs: str
    digest: str
    samples: int
    seq_len: int
    seed: int
    synthetic: bool
    sites: tuple[SiteError, ...]
    damage: Damage

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Figures:
        """The figures that `to_dict` gave."""
        sites = tuple(SiteError(**site) for site in data["sites"])
        return cls(**{**data, "sites": sites, "damage": Damage(**data["damage"])})


@torch.no_grad()
def measure(checkpoint: Checkpoint, samples: Samples, plan: Plan, seed: int) -> Figures:
    """Run the model exactly, with every site measured on exact inputs, and approximated.

    Args:
        checkpoint: The model, unpatched.
        samples: What to feed it.
        plan: What to approximate.
        seed: What the samples were made with; chooses the tokens masked-language models guess.
    """
    judge = Judge(checkpoint.model, samples.batches, checkpoint.tokenizer, seed)
    errors: dict[str, list[Tensor]] = defaultdict(list)
    densities: dict[str, list[Tensor]] = defaultdict(list)
    names = {id(site): name for name, site in plan.sites.items()}

    def compare(site: SitePlan, call: AttentionCall) -> Tensor:
        exact = call.exact()
        if site.reason_for_exact(call) is None:
            result = site.method(call)
            name = names[id(site)]
            errors[name].append(relative_error(result.output, exact, call.valid_rows))
            densities[name].append(result.density.double())
        return exact

    with intercepted(checkpoint.model, plan.sites, compare):
        for batch in samples.batches:
            checkpoint.model(**batch)
    with patched(checkpoint.model, plan):
        damage = judge.judge()
    sites = [
        SiteError(name, float(torch.cat(errors[name]).mean()), float(torch.cat(found).mean()))
        for name, found in densities.items()
    ]
    return Figures(
        inputs=samples.source,
        digest=samples.digest,
        samples=len(samples.batches),
        seq_len=samples.length,
        seed=seed,
        synthetic=samples.synthetic,
        sites=tuple(sites),
        damage=damage,
    )
