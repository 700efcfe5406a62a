"""Which methods are compared, with which settings."""

from __future__ import annotations

from collections.abc import Mapping

from mra_cli.errors import InputError
from mra_cli.methods import METHODS, Method, make_method

BASELINES = ("mra", "window", "vmean")
"""Always among them: the default, what is near, and what everyone must beat."""


def choose_methods(names: str, budget: float, settings: Mapping[str, str]) -> list[Method]:
    """Methods by name, and the baselines.

    Args:
        names: Separated by commas; or ``all``: those that need no calibration, and those that
            ``settings`` gives one.
        settings: Values by ``METHOD.KEY``, as text.

    Raises:
        InputError: No such method or setting, or a setting of a method that is not compared.
    """
    by_method: dict[str, dict[str, str]] = {}
    for setting, value in settings.items():
        method, dot, key = setting.partition(".")
        if not dot:
            raise InputError(
                f"--set must name a method, like smyrf.hashes=8; got {setting}={value}; "
                f"write METHOD.{setting}={value}"
            )
        by_method.setdefault(method, {})[key] = value
    if names == "all":
        wanted = [n for n, m in METHODS.items() if not m.about.calibrated or n in by_method]
    else:
        wanted = [name.strip() for name in names.split(",")]
    wanted = list(dict.fromkeys([*wanted, *BASELINES]))
    chosen = [make_method(name, budget, by_method.pop(name, {})) for name in wanted]
    if by_method:
        name = next(iter(by_method))
        raise InputError(
            f"--set is for the methods compared, {', '.join(wanted)}; got {name!r}; add it to "
            "--methods"
        )
    return chosen
