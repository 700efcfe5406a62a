"""The model card of a patched checkpoint."""

from __future__ import annotations

import json
import re

import torch
import transformers

from mra_cli import __version__
from mra_cli.evaluate import Damage
from mra_cli.figures import Figures
from mra_cli.plan import Plan

_BEGIN, _END = "<!-- mra-cli: begin -->", "<!-- mra-cli: end -->"
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def model_card(
    original: str, plan: Plan, figures: Figures | None, name: str, *, strict: bool
) -> str:
    """The source's card with ours on top; its front matter (licence, tags) stays in front.

    Args:
        original: The source's README, or "".
        name: What to call the source.
    """
    original = original.replace("\r\n", "\n")
    original = re.sub(f"{_BEGIN}.*?{_END}\n*", "", original, flags=re.DOTALL)
    front = _FRONT_MATTER.match(original)
    head = front[0] if front else "---\nlibrary_name: transformers\n---\n"
    body = original[front.end() if front else 0 :].strip()
    name = _plain(name)
    without = (
        "loading fails (the checkpoint is strict), and so it does in tools that run no code"
        if strict
        else "this is the **exact** model, with the same weights and unchanged results"
    )
    parts = [
        _BEGIN,
        f"# {name}, with approximated attention",
        f"The weights of `{name}`, untouched. At {len(plan.sites)} attention sites, softmax "
        f"attention is approximated as `mra_plan.json` says, by {_methods(plan)}.",
        "```python\nfrom transformers import AutoModel  # or AutoModelForCausalLM, ...\n\n"
        'model = AutoModel.from_pretrained("PATH", trust_remote_code=True)\n```',
        f"- Without `trust_remote_code=True`, {without}.\n"
        '- `attn_implementation="sdpa"` gives the exact model, too.\n'
        "- With mra-cli installed, no remote code is needed: `mra_cli.load(PATH)` in Python, "
        "`mra-cli run PATH PROMPT` in a shell; `mra-cli verify PATH` checks this directory.",
        "## Plan",
        _settings(plan),
        "## What it does to the model",
        _damage(figures),
        _sites(plan, figures),
        f"Made by mra-cli {__version__} with transformers {transformers.__version__} and torch "
        f"{torch.__version__}.",
        _END,
    ]
    return "\n\n".join([head.rstrip(), *parts, body]).rstrip() + "\n"


def _methods(plan: Plan) -> str:
    used = {site.method.name: site.method.about.source for site in plan.sites.values()}
    return ", ".join(f"`{name}` ({source})" for name, source in used.items())


def _settings(plan: Plan) -> str:
    kinds: dict[str, int] = {}
    for site in plan.sites.values():
        settings = site.method.settings()
        words = ", ".join(f"{k}={_short(v)}" for k, v in settings.items() if k != "method")
        shortest = f", exact below {site.min_length} tokens" if site.min_length else ""
        words = f"`{settings['method']}` ({words}){shortest}"
        kinds[words] = kinds.get(words, 0) + 1
    return "\n".join(f"- {count} sites: {words}" for words, count in kinds.items())


def _damage(figures: Figures | None) -> str:
    if figures is None:
        return "Not measured. `mra-cli analyze` measures it on your text."
    length = f"{figures.seq_len} tokens of " if figures.seq_len else ""
    lines = [f"- {line}" for line in damage_words(figures.damage)]
    note = " (synthetic inputs: measure on real ones before you believe it)"
    return "\n".join(
        [
            f"On {figures.samples} x {length}{_plain(figures.inputs)}"
            f"{note if figures.synthetic else ''}, all sites together:\n",
            *lines,
        ]
    )


def damage_words(damage: Damage) -> list[str]:
    """The damage, one figure a line."""
    lines = [f"recovery {damage.recovery:.4f}"]
    if damage.perplexity is not None:
        lines.append(f"perplexity {damage.perplexity:.3f} (exact: {damage.perplexity_exact:.3f})")
    if damage.kl is not None and damage.top1_agreement is not None:
        lines.append(f"KL divergence {damage.kl:.4f} nats")
        lines.append(f"most likely class the same: {100 * damage.top1_agreement:.1f} %")
    if damage.cosine_mean is not None and damage.cosine_min is not None:
        lines.append(f"embedding cosine {damage.cosine_mean:.4f} (lowest {damage.cosine_min:.4f})")
    if damage.output_change is not None:
        lines.append(f"output change {100 * damage.output_change:.1f} %")
    return lines


def _sites(plan: Plan, figures: Figures | None) -> str:
    found = {} if figures is None else {site.site: site for site in figures.sites}
    rows = [
        "| site | method | budget | density | output error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, site in plan.sites.items():
        figure = found.get(name)
        measured = ("", "") if figure is None else (f"{figure.density:.3f}", f"{figure.error:.4f}")
        cells = [f"`{name}`", site.method.name, f"{site.method.budget:g}", *measured]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _short(value: object) -> str:
    return json.dumps(value).strip('"')


def _plain(text: str) -> str:
    """Text that can't be mistaken for markup, nor leave its line."""
    return re.sub(r"[`<>\[\]|*\x00-\x1f]", "_", text)[:200]
