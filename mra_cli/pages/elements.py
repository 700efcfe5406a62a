"""HTML from Python values. Text is escaped; what is made here is `Html` and stays as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

_VOID = ("br", "input", "meta")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: Any) -> Html:
    """An element. Attributes: ``class_`` is ``class``, ``_`` is ``-``; None and False leave out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    shown = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in given.items()
        if value is not None and value is not False
    )
    if element in _VOID:
        return Html(f"<{element}{shown}>")
    return Html(f"<{element}{shown}>{joined(children)}</{element}>")


def joined(children: Iterable[object]) -> Html:
    """One after the other, escaped where they are not HTML."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str, class_: str = ""
) -> Html:
    """A table whose first column heads its rows; it scrolls sideways where it has to.

    Cells are text, or the ``td`` made by the caller.
    """
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", first, scope="row"), *map(_cell, rest)) for first, *rest in rows]
    inner = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body))
    scrolls = {"tabindex": "0", "role": "region", "aria_label": caption}
    return tag("div", inner, class_=f"scroll {class_}".strip(), **scrolls)


def _cell(content: object) -> Html:
    made = isinstance(content, Html) and content.startswith("<td")
    return content if isinstance(content, Html) and made else tag("td", content)


def heat(shown: str, share: float, title: str = "", *, mark: bool = False) -> Html:
    """A table cell coloured by a share of 1."""
    share = min(max(share, 0.0), 1.0)
    kinds = {"heat": True, "deep": 0.5 < share <= 0.66, "deepest": share > 0.66, "mark": mark}
    classes = " ".join(kind for kind, given in kinds.items() if given)
    return tag("td", shown, class_=classes, style=f"--share:{share:.3f}", title=title or None)


def choice(name: str, views: Mapping[str, Html], legend: str) -> Html:
    """Several views of which one shows, chosen by radio buttons; a printer shows them all."""
    radios, panels = [], []
    for number, (label, view) in enumerate(views.items()):
        key = f"{name}-{number}"
        radio = tag("input", type="radio", name=name, id=key, checked=number == 0)
        radios += [radio, tag("label", label, for_=key)]
        panels.append(tag("div", tag("h4", label), view, class_="view"))
    if len(views) == 1:
        return joined(views.values())
    return tag(
        "fieldset",
        tag("legend", legend),
        *radios,
        tag("div", *panels, class_="views"),
        class_="choice",
    )


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def page(title: str, subtitle: str, *parts: object) -> str:
    """The whole document."""
    style = files("mra_cli").joinpath("data/page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    top = tag("header", tag("h1", title), tag("p", subtitle, class_="subtitle"))
    body = tag("body", top, tag("main", *parts))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def section(title: str, *parts: object, note: str = "") -> Html:
    """A part of the page under a heading."""
    says = [tag("p", note, class_="note")] if note else []
    return tag("section", tag("h2", title), *says, *parts)
