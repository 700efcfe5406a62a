"""Triton's own IR (TTIR), printed as text, read into a tree of operations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "index": 8, "ptr": 8}
_BYTES |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}


@dataclass(frozen=True)
class Type:
    """Type of a value.

    Attributes:
        element: ``f32``, ``i64``, ..., or ``ptr``.
        shape: None for a scalar.
        pointee: What a pointer points at.
    """

    element: str
    shape: tuple[int, ...] | None = None
    pointee: str | None = None

    @property
    def bytes(self) -> int:
        """Of one element."""
        return _BYTES[self.element]

    @property
    def size(self) -> int:
        """Elements."""
        count = 1
        for extent in self.shape or ():
            count *= extent
        return count

    def of(self, element: str) -> Type:
        """The same shape of another element."""
        return Type(element, self.shape)

    @property
    def at_pointer(self) -> Type:
        """What a load through this pointer, or tensor of pointers, gives."""
        assert self.pointee is not None
        return Type(self.pointee, self.shape)


@dataclass(eq=False)
class Block:
    """Operations that run one after the other."""

    label: str
    args: list[tuple[str, Type]]
    ops: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        name: With its dialect: ``tt.load``.
        results: Names of what it computes, and their types.
        operands: Names, as they stand in the text.
        text: What follows the name, without attributes and types.
        attributes: As text, by name.
        types: The types written behind the colon, before any arrow.
        regions: Of control flow, reductions and scans, each a list of blocks.
    """

    name: str
    results: list[str]
    operands: list[str]
    text: str
    attributes: dict[str, str]
    types: list[Type]
    result_types: list[Type]
    regions: list[list[Block]] = field(default_factory=list)


@dataclass(eq=False)
class Function:
    """A kernel."""

    name: str
    args: list[tuple[str, Type]]
    blocks: list[Block]


VALUE = re.compile(r"%[\w#$.-]+")
_OP = re.compile(r'^(?:(%.+?) = )?"?([a-z_]+\.[a-z_0-9.]+)"?(.*)$')
_ATTRIBUTES = re.compile(r"<?\{([^{}]*)\}>?")


def parse(text: str) -> Function:
    """The kernel of a module printed without locations."""
    return _Parser(text).function()


def split(text: str) -> list[str]:
    """At the commas outside all brackets."""
    parts, depth, part = [], 0, ""
    for i, char in enumerate(text):
        if char in "<({[":
            depth += 1
        elif char in ")}]" or (char == ">" and text[i - 1 : i] != "-"):
            depth -= 1
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() else parts


def parse_type(text: str) -> Type:
    """One type, as printed."""
    text = text.strip()
    match = re.match(r"tensor<((?:\d+x)+)(.*)>$", text)
    shape = tuple(int(x) for x in match.group(1).split("x")[:-1]) if match else None
    element = match.group(2) if match else text
    pointer = re.match(r"!tt\.ptr<([^,>]+)", element)
    return Type("ptr", shape, pointer.group(1)) if pointer else Type(element, shape)


class _Parser:
    def __init__(self, text: str) -> None:
        self._lines = [line.strip() for line in text.splitlines() if line.strip()]
        self._at = 0

    def _next(self) -> str:
        self._at += 1
        return self._lines[self._at - 1]

    def function(self) -> Function:
        functions = [i for i, line in enumerate(self._lines) if line.startswith("tt.func")]
        if len(functions) != 1:
            raise NotImplementedError(f"{len(functions)} functions; noinline isn't supported")
        self._at = functions[0]
        match = re.match(r"tt\.func \w+ @(\w+)\((.*)\)(?: attributes .*)? \{$", self._next())
        assert match, self._lines[functions[0]]
        args = [_typed(re.sub(r"\{[^{}]*\}$", "", arg)) for arg in split(match.group(2))]
        blocks, _ = self._region()
        return Function(match.group(1), args, blocks)

    def _region(self) -> tuple[list[Block], str]:
        """The blocks up to the closing brace, and the line that closes them."""
        blocks = [Block("", [])]
        while not (line := self._next()).startswith("}"):
            if line.startswith("^"):
                match = re.match(r"\^(\w+)(?:\((.*)\))?:", line)
                assert match, line
                block = Block(match.group(1), [_typed(arg) for arg in split(match.group(2) or "")])
                if blocks[-1].ops or blocks[-1].label:
                    blocks.append(block)
                else:
                    blocks[-1] = block
            elif not line.startswith("//"):
                blocks[-1].ops.append(self._op(line))
        return blocks, line

    def _op(self, line: str) -> Op:
        match = _OP.match(line)
        if not match:
            raise NotImplementedError(line)
        results = _results(match.group(1))
        name, rest = match.group(2), match.group(3).strip()
        regions = []
        if rest.endswith("({"):
            blocks, end = self._region()
            regions.append(blocks)
            rest = rest.removesuffix("({") + end.removeprefix("})")
        elif rest.endswith("{") and name.startswith("scf."):
            rest = rest.removesuffix("{").strip()
            end = "} else {"
            while end.endswith("{"):
                blocks, end = self._region()
                regions.append(blocks)
            if name == "scf.for" and "->" not in rest and " : " not in rest:
                rest += " : i32"
        attributes: dict[str, str] = {}
        for found in _ATTRIBUTES.findall(rest):
            for pair in split(found):
                key, _, value = pair.partition(" = ")
                attributes[key] = value.split(" : ")[0]
        bare = " " + " ".join(_ATTRIBUTES.sub("", rest).split())
        text, _, types = bare.rpartition(" : ") if " : " in bare else (bare, "", "")
        if name.startswith(("scf.for", "scf.while", "scf.if", "cf.")):
            text, types = bare, ""
        inputs, outputs = _types(name, bare if name.startswith("scf.") else types)
        return Op(name, results, VALUE.findall(text), text, attributes, inputs, outputs, regions)


def _typed(text: str) -> tuple[str, Type]:
    name, _, rest = text.partition(":")
    return name.strip(), parse_type(rest)


def _results(text: str | None) -> list[str]:
    names: list[str] = []
    for part in (text or "").split(", ") if text else []:
        name, _, count = part.partition(":")
        names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return names


def _types(name: str, text: str) -> tuple[list[Type], list[Type]]:
    """Types of operands and of results."""
    if name.startswith("scf."):
        arrow = re.search(r"-> (\(.*\)|[^{]*?)\s*(?:: \w+)?$", text)
        inner = arrow.group(1).strip().removeprefix("(").removesuffix(")") if arrow else ""
        return [], [parse_type(part) for part in split(inner)]
    before, arrow_, after = (text + " ").partition(" -> ")
    if not arrow_:
        before, arrow_, after = (text + " ").partition(" to ")
    before = before.strip().removeprefix("(").removesuffix(")") if "(" in before[:2] else before
    inputs = [parse_type(p) for part in split(before) for p in part.split(" * ") if p.strip()]
    if arrow_:
        after = after.strip().removeprefix("(").removesuffix(")")
        return inputs, [parse_type(part) for part in split(after)]
    if not inputs:
        return inputs, []
    if name == "tt.load":
        return inputs, [inputs[0].at_pointer]
    if name in ("arith.cmpi", "arith.cmpf"):
        return inputs, [inputs[0].of("i1")]
    return inputs, [inputs[-1] if name == "arith.select" else inputs[0]]
