"""Loops, branches and jumps of TTIR in C."""

from __future__ import annotations

import re

from triton_cpu.emit import C_TYPES, Emitter, Value
from triton_cpu.ttir import VALUE, Op, Type, split


def for_loop(to: Emitter, op: Op) -> None:
    head, _, rest = op.text.partition(" iter_args(")
    counter, low, high, step = VALUE.findall(head)
    pairs = [part.split(" = ") for part in split(rest.partition(") -> ")[0])] if rest else []
    carried = to.variables([p[0] for p in pairs], [to.env[p[1]] for p in pairs])
    kind = re.search(r" : (i32|i64|index)$", op.text)
    element = kind.group(1) if kind else "i32"
    i, c_type = to.name("n"), C_TYPES[element]
    bounds = [to.env[x].at([]) for x in (low, high, step)]
    to.open(f"for ({c_type} {i} = {bounds[0]}; {i} < {bounds[1]}; {i} += {bounds[2]})")
    to.env[counter] = Value(Type(element), lambda index: i)
    if (end := to.block(op.regions[0][0])) is not None:
        to.assign(carried, to.operands(end))
    to.close()
    to.bind(op.results, carried)


def branch(to: Emitter, op: Op) -> None:
    results = [to.new(kind) for kind in op.result_types]
    to.open(f"if ({to.env[op.operands[0]].at([])})")
    for place, region in enumerate(op.regions):
        if place:
            to.close("} else {")
        if (end := to.block(region[0])) is not None:
            to.assign(results, to.operands(end))
    to.close()
    to.bind(op.results, results)


def while_loop(to: Emitter, op: Op) -> None:
    pairs = [
        part.split(" = ") for part in split(op.text[op.text.index("(") + 1 : op.text.index(") : ")])
    ]
    carried = to.variables([p[0] for p in pairs], [to.env[p[1]] for p in pairs])
    results = [to.new(kind) for kind in op.result_types]
    before, after = (region[0] for region in op.regions)
    to.open("for (;;)")
    end = to.block(before)
    assert end is not None
    condition, *values = to.operands(end)
    to.assign(results, values)
    to.emit(f"if (!{condition.at([])}) break;")
    to.bind([name for name, _ in after.args], results)
    if (end := to.block(after)) is not None:
        to.assign(carried, to.operands(end))
    to.close()
    to.bind(op.results, results)


def jump(to: Emitter, op: Op) -> None:
    """``cf.br`` and ``cf.cond_br``: early returns."""
    targets = re.findall(r"\^(\w+)(?:\(([^:)]*)[^)]*\))?", op.text)
    if op.name == "cf.cond_br":
        to.open(f"if ({to.env[op.operands[0]].at([])})")
    for place, (label, names) in enumerate(targets):
        if place:
            to.close("} else {")
        block = next(b for b in to.function.blocks if b.label == label)
        values = [to.env[name.strip()] for name in names.split(",") if name.strip()]
        to.assign([to.env[name] for name, _ in block.args], values)
        to.emit(f"goto {label};")
    if op.name == "cf.cond_br":
        to.close()
