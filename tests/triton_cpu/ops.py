"""What single operations of TTIR are in C: arithmetic, conversions, shapes."""

from __future__ import annotations

import re
from collections.abc import Callable

from triton_cpu import control, tiles
from triton_cpu.emit import C_TYPES, Emitter, Index, Value, contiguous, in_memory
from triton_cpu.ttir import Op, Type

_INFIX = {"add": "+", "sub": "-", "mul": "*"}
_INFIX = {f"{name}{kind}": sign for name, sign in _INFIX.items() for kind in "if"}
_INFIX |= {"divf": "/", "andi": "&", "ori": "|", "xori": "^", "shli": "<<", "shrsi": ">>"}
_SIGNED = {"divsi": "div_s", "remsi": "rem_s", "maxsi": "max_s", "minsi": "min_s"}
_UNSIGNED = {"divui": "div_u", "remui": "rem_u", "maxui": "max_u", "minui": "min_u"}
_CALLS = {"maxnumf": "maxnumf_", "minnumf": "minnumf_", "remf": "fmodf"}
_CALLS |= {"maximumf": "maximumf_", "minimumf": "minimumf_", "precise_divf": "div"}
_BINARY = {*_INFIX, *_SIGNED, *_UNSIGNED, *_CALLS, "shrui", "mulhiui"}
_MATH = {
    "exp2": "exp2_({})",
    "exp": "exp2_(({})*1.4426950408889634f)",
    "log2": "log2f({})",
    "log": "logf({})",
    "sqrt": "sqrtf({})",
    "precise_sqrt": "sqrtf({})",
    "rsqrt": "(1.0f/sqrtf({}))",
    "absf": "fabsf({})",
    "absi": "llabs({})",
    "floor": "floorf({})",
    "ceil": "ceilf({})",
    "erf": "erff({})",
    "cos": "cosf({})",
    "sin": "sinf({})",
    "tanh": "tanhf({})",
    "negf": "(-({}))",
}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ORDERED = {"u" + name: sign for name, sign in _COMPARED.items()}  # u: true of NaN as well
_CASTS = ("extsi", "extui", "trunci", "sitofp", "uitofp", "fptosi", "fptoui", "extf", "truncf")
_SKIPPED = ("tt.assert", "tt.print", "llvm.intr.assume", "ttg.barrier")


def emit_op(to: Emitter, op: Op) -> None:
    """Emits one operation.

    Raises:
        NotImplementedError: It is not known; the message has its text.
    """
    dialect, _, name = op.name.partition(".")
    special: dict[str, Callable[[Emitter, Op], None]] = {
        "scf.for": control.for_loop,
        "scf.if": control.branch,
        "scf.while": control.while_loop,
        "cf.br": control.jump,
        "cf.cond_br": control.jump,
        "tt.load": tiles.load,
        "tt.store": tiles.store,
        "tt.atomic_rmw": tiles.atomic,
        "tt.atomic_cas": tiles.atomic,
        "tt.dot": tiles.dot,
        "tt.reduce": tiles.reduce,
        "tt.scan": tiles.scan,
        "tt.histogram": tiles.histogram,
        "tt.gather": tiles.gather,
        "tt.return": lambda to, op: to.emit("return;"),
        "tt.addptr": _addptr,
        "tt.bitcast": _bits,
        "arith.bitcast": _bits,
        "arith.select": _select,
        "arith.cmpi": _compare,
        "arith.cmpf": _compare,
        "arith.constant": _constant,
        "ub.poison": _constant,
    }
    if op.name in special:
        special[op.name](to, op)
    elif op.name in _SKIPPED:
        pass
    elif name in ("get_program_id", "get_num_programs"):
        text = ("p" if name == "get_program_id" else "g") + op.text.strip()[0]
        to.env[op.results[0]] = Value(op.result_types[0], lambda index: text)
    elif dialect == "tt" and name in _SHAPES:
        to.env[op.results[0]] = _SHAPES[name](to, op)
    elif name in ("join", "split"):
        _join_or_split(to, op)
    elif name in _CASTS or name in ("index_cast", "fp_to_fp", "int_to_ptr", "ptr_to_int"):
        _convert(to, op)
    elif name in _MATH:
        (x,) = to.operands(op)
        element = x.type.element
        text = _MATH[name] if element != "f64" else re.sub(r"f\(|_\(", "(", _MATH[name])
        to.define(op, lambda i: to.cast(element, text.format(to.read(x, i))), x.cost + 4)
    elif name in ("fma", "clampf"):
        _ternary(to, op)
    elif name in _BINARY:
        _binary(to, op)
    else:
        raise NotImplementedError(f"{op.name} {op.text}")


def _constant(to: Emitter, op: Op) -> None:
    kind = op.result_types[0] if op.result_types else None
    text = op.text.strip()
    kind = kind or Type("i1")  # `true` and `false` are printed without a type
    if op.name == "ub.poison":
        text = "0x7FC00000" if kind.element == "f32" else "0"
    to.env[op.results[0]] = to.constant(kind, text)


def _binary(to: Emitter, op: Op) -> None:
    name = op.name.partition(".")[2]
    x, y = to.operands(op)
    element = x.type.element
    unsigned = f"u{C_TYPES[element].removeprefix('u')}" if element[0] == "i" else ""

    def at(index: Index) -> str:
        a, b = to.read(x, index), to.read(y, index)
        if name in _INFIX:
            text = f"({a}{_INFIX[name]}{b})"
        elif name == "precise_divf":
            text = f"({a}/{b})"
        elif name in _CALLS:
            call = _CALLS[name] if element != "f64" else _CALLS[name].removesuffix("f_")
            text = f"{call}({a},{b})"
        elif name in _SIGNED:
            text = f"{_SIGNED[name]}({a},{b})"
        elif name in _UNSIGNED:
            text = f"{_UNSIGNED[name]}(({unsigned}){a},({unsigned}){b})"
        elif name == "shrui":
            text = f"(({unsigned}){a}>>({unsigned}){b})"
        else:
            text = f"(((uint64_t)({unsigned}){a}*({unsigned}){b})>>32)"
        return to.cast(element, text)

    to.define(op, at, x.cost + y.cost + 1)


def _ternary(to: Emitter, op: Op) -> None:
    x, y, z = to.operands(op)
    element = x.type.element

    def at(index: Index) -> str:
        a, b, c = (to.read(v, index) for v in (x, y, z))
        fused = op.name.endswith("fma")
        name = "__builtin_fma" if element == "f64" else "__builtin_fmaf"
        text = f"{name}({a},{b},{c})" if fused else f"minnumf_(maxnumf_({a},{b}),{c})"
        return to.cast(element, text)

    to.define(op, at, x.cost + y.cost + z.cost + 2)


def _select(to: Emitter, op: Op) -> None:
    condition, x, y = to.operands(op)

    def at(index: Index) -> str:
        chosen = condition.at(index if condition.type.shape is not None else [])
        return f"(({chosen})?{x.at(index)}:{y.at(index)})"

    to.define(op, at, condition.cost + x.cost + y.cost + 1)


def _compare(to: Emitter, op: Op) -> None:
    predicate = op.text.replace(",", " ").split()[0]
    x, y = to.operands(op)
    whole = op.name == "arith.cmpi"
    cast = (
        f"(u{C_TYPES[x.type.element].removeprefix('u')})" if whole and predicate[0] == "u" else ""
    )
    negated = not whole and predicate in _ORDERED and predicate != "une"
    sign = _COMPARED[predicate[-2:]]
    if negated:
        sign = {"==": "!=", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}[sign]
        if predicate == "ueq":
            raise NotImplementedError(op.text)

    def at(index: Index) -> str:
        text = f"({cast}{to.read(x, index)}{sign}{cast}{to.read(y, index)})"
        return f"(uint8_t){'!' if negated else ''}{text}"

    to.define(op, at, x.cost + y.cost + 1)


def _convert(to: Emitter, op: Op) -> None:
    name = op.name.partition(".")[2]
    (x,) = to.operands(op)
    source, target = x.type.element, op.result_types[0].element

    def at(index: Index) -> str:
        text = to.read(x, index)
        if name in ("extui", "uitofp"):
            text = f"(u{C_TYPES[source].removeprefix('u')})({text})"
        elif source == "i1" and name in ("extsi", "sitofp"):
            text = f"-(int)({text})"
        elif target == "i1":
            text = f"(({text})&1)"
        return to.cast(target, text)

    to.define(op, at, x.cost + 1)


def _bits(to: Emitter, op: Op) -> None:
    (x,) = to.operands(op)
    source, target = x.type.element, op.result_types[0].element
    if source == target:
        to.env[op.results[0]] = x
        return
    pair = f"{C_TYPES[source]} a; {C_TYPES[target]} b;"
    to.define(op, lambda i: f"((union {{ {pair} }}){{ .a = {x.at(i)} }}).b", x.cost + 1)


def _addptr(to: Emitter, op: Op) -> None:
    x, y = to.operands(op)
    size = x.type.at_pointer.bytes if x.type.pointee else op.result_types[0].at_pointer.bytes

    def at(index: Index) -> str:
        return f"({x.at(index)}+(uint64_t)((int64_t)({y.at(index)})*{size}))"

    to.define(op, at, x.cost + y.cost + 1)


# --- shapes ----------------------------------------------------------------------------------


def _make_range(to: Emitter, op: Op) -> Value:
    start = op.attributes["start"]
    return Value(op.result_types[0], lambda i: f"({i[0]}+{start})")


def _splat(to: Emitter, op: Op) -> Value:
    (x,) = to.operands(op)
    return Value(op.result_types[0], lambda i: x.at([]))


def _unsplat(to: Emitter, op: Op) -> Value:
    (x,) = to.operands(op)
    zeros = ["0"] * len(x.type.shape or ())
    return to.computed(Value(op.result_types[0], lambda i: x.at(zeros)))


def _broadcast(to: Emitter, op: Op) -> Value:
    (x,) = to.operands(op)
    shape = x.type.shape or ()
    x = to.computed(x) if x.cost > 2 and x.type.element != "ptr" else x
    return Value(
        op.result_types[0],
        lambda index: x.at(["0" if n == 1 else i for i, n in zip(index, shape, strict=True)]),
        x.cost,
    )


def _expand_dims(to: Emitter, op: Op) -> Value:
    (x,) = to.operands(op)
    axis = int(op.attributes["axis"])
    return Value(op.result_types[0], lambda i: x.at([*i[:axis], *i[axis + 1 :]]), x.cost)


def _reshape(to: Emitter, op: Op) -> Value:
    (x,) = to.operands(op)
    x = to.computed(x)
    if x.strides != contiguous(x.type.shape or ()):
        x = to.computed(Value(x.type, x.at))
    assert x.buffer is not None
    return in_memory(op.result_types[0], x.buffer)


def _trans(to: Emitter, op: Op) -> Value:
    (x,) = to.operands(op)
    order = [int(axis) for axis in re.findall(r"\d+", op.attributes["order"].partition(":")[2])]
    if x.buffer is not None:
        return in_memory(op.result_types[0], x.buffer, [x.strides[axis] for axis in order])

    def at(index: Index) -> str:
        back = dict(zip(order, index, strict=True))
        return x.at([back[axis] for axis in range(len(order))])

    return Value(op.result_types[0], at, x.cost)


_SHAPES: dict[str, Callable[[Emitter, Op], Value]] = {
    "make_range": _make_range,
    "splat": _splat,
    "unsplat": _unsplat,
    "broadcast": _broadcast,
    "expand_dims": _expand_dims,
    "reshape": _reshape,
    "trans": _trans,
}


def _join_or_split(to: Emitter, op: Op) -> None:
    values = [to.computed(x) for x in to.operands(op)]
    if op.name == "tt.join":
        x, y = values
        joined = Value(op.result_types[0], lambda i: f"({i[-1]}?{y.at(i[:-1])}:{x.at(i[:-1])})")
        to.env[op.results[0]] = to.computed(joined)
        return
    (x,) = values
    kind = op.result_types[0]
    for name, half in zip(op.results, "01", strict=True):
        to.env[name] = to.computed(Value(kind, lambda i, half=half: x.at([*i, half])))
