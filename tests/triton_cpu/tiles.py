"""Memory, matrix products, reductions and scans of TTIR in C. Every access is checked, counted."""

from __future__ import annotations

from collections.abc import Callable

from triton_cpu.emit import C_TYPES, Emitter, Index, Value, in_memory
from triton_cpu.ttir import Op, Type

# --- memory ----------------------------------------------------------------------------------


def _owner(to: Emitter, pointer: Value, mask: Value | None, counters: str) -> str:
    """Finds the argument that a tile of pointers lies in, and counts; the C name of its number."""
    shape, size = pointer.type.shape or (), pointer.type.at_pointer.bytes
    low, high, count, owner = (to.name(x) for x in ("low", "high", "count", "owner"))
    to.emit(f"uint64_t {low} = UINT64_MAX, {high} = 0, {count} = 0;")
    lanes = to.name("lanes")
    to.emit(f"uint64_t {lanes} = 0;")

    def look(index: Index) -> str:
        own = f"!({_asked_before(pointer, mask, index)})" if to.distinct else "1"
        inside = f"uint64_t at = {pointer.at(index)}; {low} = min_u({low}, at); "
        inside += f"{high} = max_u({high}, at); {lanes}++; {count} += {own};"
        return f"if ({mask.at(index)}) {{ {inside} }}" if mask else inside

    to.loops(shape, look)
    to.emit(f"int {owner} = {lanes} ? owner(memory, {low}, {high} + {size}, {lanes}) : -1;")
    for counter in counters.split():
        total = f"memory->counts.{counter}[{owner}]"
        to.emit(f"if ({owner} >= 0) {total} += {count} * {size};")
    return owner


def _asked_before(pointer: Value, mask: Value | None, index: Index) -> str:
    """Whether the lane before this one along an axis asks for the same."""
    tests = ["0"]
    for axis, lane in enumerate(index):
        if lane != "0":
            before = [*index[:axis], f"({lane}-1)", *index[axis + 1 :]]
            active = f" && {mask.at(before)}" if mask else ""
            tests.append(f"({lane} > 0 && {pointer.at(before)} == at{active})")
    return " || ".join(tests)


def load(to: Emitter, op: Op) -> None:
    """Lanes that are masked off get ``other``, and where there is none, what shows if used."""
    pointer, *rest = to.operands(op)
    mask, other = (*rest, None, None)[:2]
    kind = op.result_types[0]
    owner = _owner(to, pointer, mask, "loaded")
    result = to.new(kind)
    unset = "NAN" if kind.element in ("f16", "bf16", "f32", "f64") else "0x55"

    def body(index: Index) -> str:
        test = f"{owner} >= 0" + (f" && {mask.at(index)}" if mask else "")
        default = other.at(index) if other else to.cast(kind.element, unset)
        here = f"*(const {C_TYPES[kind.element]}*)({pointer.at(index)})"
        return f"{result.at(index)} = ({test}) ? {here} : {default};"

    to.loops(kind.shape or (), body)
    to.env[op.results[0]] = result


def store(to: Emitter, op: Op) -> None:
    pointer, value, *rest = to.operands(op)
    mask = rest[0] if rest else None
    owner = _owner(to, pointer, mask, "stored")
    c_type = C_TYPES[value.type.element]

    def body(index: Index) -> str:
        test = f"{owner} >= 0" + (f" && {mask.at(index)}" if mask else "")
        return f"if ({test}) *({c_type}*)({pointer.at(index)}) = {value.at(index)};"

    to.loops(pointer.type.shape or (), body)


_UPDATES = {
    "fadd": "old + new",
    "add": "old + new",
    "max": "old > new ? old : new",
    "min": "old < new ? old : new",
    "umax": "old > new ? old : new",
    "umin": "old < new ? old : new",
    "exch": "new",
    "and": "old & new",
    "or": "old | new",
    "xor": "old ^ new",
}


def atomic(to: Emitter, op: Op) -> None:
    """One program at a time; orderings and scopes weaker than that are as strong here."""
    swap = op.name == "tt.atomic_cas"
    pointer, *rest = to.operands(op)
    rule = "" if swap else op.text.strip().split(",")[0]
    mask = None if swap or len(rest) < 2 else rest[1]
    value = rest[1] if swap else rest[0]
    element = value.type.element
    prefix = "u" if rule in ("umax", "umin") else ""
    kind = prefix + ("float" if element in ("bf16", "f16") else C_TYPES[element])
    owner = _owner(to, pointer, mask, "loaded stored")
    result = to.new(value.type)

    def body(index: Index) -> str:
        place = f"(*({C_TYPES[element]}*)({pointer.at(index)}))"
        old = f"from_bf16({place})" if element == "bf16" else place
        test = f"{owner} >= 0" + (f" && {mask.at(index)}" if mask else "")
        keep = f"{result.at(index)} = {place};"
        if swap:
            expected = rest[0].at(index)
            return f"if ({test}) {{ {keep} if ({old} == {expected}) {place} = {value.at(index)}; }}"
        update = to.cast(element, _UPDATES[rule])
        names = f"{kind} old = {old}, new = {to.read(value, index)};"
        return f"if ({test}) {{ {keep} {names} {place} = {update}; }}"

    to.emit("#pragma omp critical (atomics)")
    to.open("")
    to.loops(value.type.shape or (), body, apart=False)
    to.close()
    if op.results:
        to.env[op.results[0]] = result


# --- products --------------------------------------------------------------------------------


def _packed(to: Emitter, source: Value, element: str, tf32: bool) -> str:
    """A row-major copy in the type that is summed in, read in the order it lies in memory."""
    assert source.type.shape is not None
    rows, cols = source.type.shape
    name = to.space(element, rows * cols)
    swap = source.strides[:1] == (1,)

    def body(index: Index) -> str:
        i, j = reversed(index) if swap else index
        text = f"({C_TYPES[element]}){to.read(source, (i, j))}"
        return f"{name}[{i}*{cols}+{j}] = {f'to_tf32({text})' if tf32 else text};"

    to.loops((cols, rows) if swap else (rows, cols), body)
    return name


def dot(to: Emitter, op: Op) -> None:
    """``a @ b + c``, summed in the type of ``c``, one term of the inner dimension after another.

    With ``tf32``, as tensor cores see float32 where a kernel lets them: rounded, or for ``tf32x3``
    split in two, without the product of the smaller parts.
    """
    a, b, c = to.operands(op)
    kind = op.result_types[0]
    if kind.shape is None or len(kind.shape) != 2:
        raise NotImplementedError(f"{op.name} of {kind.shape}")
    (rows, cols), inner = kind.shape, (a.type.shape or ())[1]
    tf32 = to.tf32 and a.type.element == "f32" and "inputPrecision = tf32" in op.text
    split, sum_type = tf32 and "tf32x3" in op.text, C_TYPES[kind.element]
    left, right = (_packed(to, x, kind.element, tf32 and not split) for x in (a, b))
    result = to.new(kind)
    to.loops(kind.shape, lambda i: f"{result.at(i)} = {c.at(i)};")
    tall = 4 if rows % 4 == 0 else 1
    wide = next((w for w in (32, 16) if cols % w == 0), cols)
    out = f"{result.buffer}[(i + r) * {cols} + j + q]"
    each = f"for (int r = 0; r < {tall}; r++) for (int q = 0; q < {wide}; q++)"
    to.open(f"for (int i = 0; i < {rows}; i += {tall}) for (int j = 0; j < {cols}; j += {wide})")
    to.emit(f"{sum_type} sum[{tall}][{wide}];")
    to.emit(f"{each} sum[r][q] = {out};")
    to.open(f"for (int k = 0; k < {inner}; k++) for (int r = 0; r < {tall}; r++)")
    to.emit(f"{sum_type} x = {left}[(i + r) * {inner} + k];")
    to.emit("#pragma GCC ivdep")
    term = "sum[r][q] + x * y" if not split else "tf32x3(x, y, sum[r][q])"
    to.open(f"for (int q = 0; q < {wide}; q++)")
    to.emit(f"{sum_type} y = {right}[k * {cols} + j + q];")
    to.emit(f"sum[r][q] = {term};")
    to.close()
    to.close()
    to.emit(f"{each} {out} = sum[r][q];")
    to.close()
    to.env[op.results[0]] = result


# --- along an axis ---------------------------------------------------------------------------


def _combine(to: Emitter, op: Op, work: list[str], left: str, right: str, into: str) -> None:
    """``into`` becomes the region's combination of ``left`` and ``right``, of every operand."""
    (block,) = op.regions[0]
    values = to.operands(op)
    for place, (name, kind) in enumerate(block.args):
        buffer, at = work[place % len(values)], left if place < len(values) else right
        variable = to.name("x")
        to.emit(f"{C_TYPES[kind.element]} {variable} = {buffer}[{at}];")
        to.env[name] = Value(kind, lambda index, variable=variable: variable)
    end = to.block(block)
    assert end is not None
    for buffer, value in zip(work, to.operands(end), strict=True):
        to.emit(f"{buffer}[{into}] = {value.at([])};")


def _along(to: Emitter, op: Op) -> tuple[list[str], int, int, int]:
    """Copies of the operands to work in; elements before, along and behind the axis."""
    axis, values = int(op.attributes["axis"]), to.operands(op)
    shape = values[0].type.shape or ()
    outer, inner = Type("i8", shape[:axis]).size, Type("i8", shape[axis + 1 :]).size
    work = []
    for value in values:
        copy = to.new(value.type)
        to.write(copy, value)
        work.append(str(copy.buffer))
    return work, outer, shape[axis], inner


def reduce(to: Emitter, op: Op) -> None:
    """By halves, as a tree."""
    work, outer, length, inner = _along(to, op)
    if length & (length - 1):
        raise NotImplementedError(f"a reduction of {length} elements")
    to.open(f"for (int o = 0; o < {outer}; o++)")
    half = length // 2
    while half:
        to.emit("#pragma GCC ivdep")
        to.open(f"for (int i = 0; i < {half * inner}; i++)")
        at = f"o * {length * inner} + i"
        _combine(to, op, work, at, f"{at} + {half * inner}", at)
        to.close()
        half //= 2
    to.close()
    for name, kind, buffer in zip(op.results, op.result_types, work, strict=True):
        if kind.shape is None:
            to.env[name] = to.computed(Value(kind, lambda index, b=buffer: f"{b}[0]"))
            continue
        packed = to.new(kind)
        to.loops((outer, inner), _moved(buffer, str(packed.buffer), length, inner))
        to.env[name] = packed


def _moved(source: str, target: str, length: int, inner: int) -> Callable[[Index], str]:
    """The first of ``length`` along an axis, closed up."""
    return lambda i: f"{target}[{i[0]}*{inner}+{i[1]}] = {source}[{i[0]}*{length * inner}+{i[1]}];"


def scan(to: Emitter, op: Op) -> None:
    work, outer, length, inner = _along(to, op)
    reverse = op.attributes.get("reverse") == "true"
    to.open(f"for (int o = 0; o < {outer}; o++)")
    to.open(f"for (int k = 1; k < {length}; k++)")
    to.open(f"for (int i = 0; i < {inner}; i++)")
    here, before = ("(L - k)", "(L - k + 1)") if reverse else ("k", "(k - 1)")
    here, before = (x.replace("L", str(length - 1)) for x in (here, before))
    at, last = (f"(o * {length} + {x}) * {inner} + i" for x in (here, before))
    _combine(to, op, work, last, at, at)
    for _ in range(3):
        to.close()
    for name, kind, buffer in zip(op.results, op.result_types, work, strict=True):
        to.env[name] = in_memory(kind, buffer)


def histogram(to: Emitter, op: Op) -> None:
    """Values outside the bins count nowhere."""
    value, *rest = to.operands(op)
    result = to.new(op.result_types[0])
    to.loops(result.type.shape or (), lambda i: f"{result.at(i)} = 0;")
    bins = result.type.size

    def body(index: Index) -> str:
        test = f"(uint64_t)bin < {bins}" + (f" && {rest[0].at(index)}" if rest else "")
        return f"int64_t bin = {value.at(index)}; if ({test}) {result.buffer}[bin]++;"

    shape = value.type.shape or ()
    for extent in shape:
        to.emit(f"for (int h = 0; h < {extent}; h++)")
    to.emit("{ " + body(["h"]) + " }")
    to.env[op.results[0]] = result


def gather(to: Emitter, op: Op) -> None:
    source, where = to.operands(op)
    source, axis = to.computed(source), int(op.attributes["axis"])

    def at(index: Index) -> str:
        return source.at([*index[:axis], f"({where.at(index)})", *index[axis + 1 :]])

    to.env[op.results[0]] = to.computed(Value(op.result_types[0], at))
