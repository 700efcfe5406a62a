"""From TTIR to C: values, buffers and blocks. What single operations do is in the files beside."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from triton_cpu.ttir import Block, Function, Op, Type

Index = Sequence[str]

C_TYPES = {"i1": "uint8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t"}
C_TYPES |= {"f16": "_Float16", "bf16": "bf16", "f32": "float", "f64": "double"}
C_TYPES |= {"ptr": "uint64_t", "index": "int64_t"}

_INLINED_COST = 8
"""Operations that may be repeated rather than kept in memory."""

_CHAIN_COST = 40
"""The same, where nothing is repeated: the longest expression."""


_READ_ONCE = ("arith.", "math.", "tt.addptr", "tt.store", "tt.dot", "tt.reduce")
"""Operations that look once at every element."""


@dataclass(frozen=True)
class Value:
    """A scalar or a tile; where it is an expression, it is computed where it is used.

    Attributes:
        type: Of the value.
        at: C expression of the element at an index.
        cost: Operations in that expression.
        buffer: Where it lies in memory, if it does.
        strides: Its strides there, in elements.
    """

    type: Type
    at: Callable[[Index], str]
    cost: int = 0
    buffer: str | None = None
    strides: tuple[int, ...] = ()


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tile in row-major order."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def in_memory(kind: Type, buffer: str, strides: Sequence[int] | None = None) -> Value:
    """The tile at ``buffer``."""
    strides = contiguous(kind.shape or ()) if strides is None else tuple(strides)

    def at(index: Index) -> str:
        terms = [f"{i}*{s}" if s != 1 else i for i, s in zip(index, strides, strict=True) if s]
        return f"{buffer}[{'+'.join(t for t in terms if t != '0') or '0'}]"

    return Value(kind, at, 0, buffer, strides)


class Emitter:
    """Writes the C of one kernel; ``emit_op`` that of single operations."""

    def __init__(
        self,
        function: Function,
        emit_op: Callable[[Emitter, Op], None],
        tf32: bool,
        distinct: bool,
    ) -> None:
        self.function, self._emit_op = function, emit_op
        self.tf32, self.distinct = tf32, distinct
        self.env: dict[str, Value] = {}
        self._lines: list[str] = []
        self._arena = self._names = 0
        self._depth = 1
        self._users: dict[str, list[tuple[Op, Block]]] = {}
        self._count_users(function.blocks)

    def _count_users(self, blocks: list[Block]) -> None:
        for block in blocks:
            for op in block.ops:
                for name in op.operands:
                    self._users.setdefault(name, []).append((op, block))
                for region in op.regions:
                    self._count_users(region)

    # --- writing -----------------------------------------------------------------------------

    def emit(self, line: str) -> None:
        self._lines.append("  " * self._depth + line)

    def name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def open(self, line: str) -> None:
        self.emit(line + " {")
        self._depth += 1

    def close(self, line: str = "}") -> None:
        """Ends what was opened; a line that ends in a brace opens anew."""
        self._depth -= 1
        self.emit(line)
        self._depth += line.endswith("{")

    def loops(
        self, shape: Sequence[int], body: Callable[[Index], str], *, apart: bool = True
    ) -> None:
        """``body`` for every index of ``shape``; ``apart``: no two touch the same memory."""
        index = [self.name("i") if extent > 1 else "0" for extent in shape]
        inner = [(i, n) for i, n in zip(index, shape, strict=True) if n > 1]
        text = body(index)
        if len(inner) > 3:  # sorting folds tiles until each axis has two elements
            steps = contiguous([n for _, n in inner])
            parts = zip(inner, steps, strict=True)
            text = " ".join(f"int {i} = flat / {step} % {n};" for (i, n), step in parts) + text
            inner = [("flat", steps[0] * inner[0][1])]
        for place, (i, extent) in enumerate(inner):
            if apart and place == len(inner) - 1:
                self.emit("#pragma GCC ivdep")
            self.emit(f"for (int {i} = 0; {i} < {extent}; {i}++)")
        self.emit("{ " + text + " }")

    # --- values ------------------------------------------------------------------------------

    def space(self, element: str, size: int) -> str:
        """A new buffer."""
        name, kind = self.name("b"), C_TYPES[element]
        self.emit(f"{kind}* restrict {name} = ({kind}*)(arena + {self._arena});")
        self._arena += (size * Type(element).bytes + 63) // 64 * 64
        return name

    def new(self, kind: Type) -> Value:
        """A tile in memory, or a scalar variable, to be written."""
        if kind.shape is None:
            name = self.name("s")
            self.emit(f"{C_TYPES[kind.element]} {name};")
            return Value(kind, lambda index: name, 0, name)
        return in_memory(kind, self.space(kind.element, kind.size))

    def write(self, target: Value, source: Value) -> None:
        if target.type.shape is None:
            self.emit(f"{target.at([])} = {source.at([])};")
        else:
            self.loops(target.type.shape, lambda i: f"{target.at(i)} = {source.at(i)};")

    def computed(self, value: Value) -> Value:
        """The value in memory, computed now."""
        if value.buffer is not None:
            return value
        target = self.new(value.type)
        self.write(target, value)
        return target

    def define(self, op: Op, at: Callable[[Index], str], cost: int) -> None:
        """The result of ``op``, as an expression while that is no waste."""
        value = Value(op.result_types[0], at, cost)
        users = self._users.get(op.results[0], [])
        whole = value.type.element[0] in "ip"
        alone = len(users) == 1 and users[0][0].name.startswith(_READ_ONCE)
        # Inlining across a loop's edge would repeat it in each turn.
        alone = alone and any(op is other for other in users[0][1].ops) and cost <= _CHAIN_COST
        lazy = value.type.shape is not None and ((whole and cost <= _INLINED_COST) or alone)
        self.env[op.results[0]] = value if lazy else self.computed(value)

    def operands(self, op: Op) -> list[Value]:
        return [self.env[name] for name in op.operands]

    def read(self, value: Value, index: Index) -> str:
        """An element, in a type C can compute with."""
        text = value.at(index)
        return f"from_bf16({text})" if value.type.element == "bf16" else text

    def cast(self, element: str, text: str) -> str:
        return f"to_bf16({text})" if element == "bf16" else f"({C_TYPES[element]})({text})"

    def constant(self, kind: Type, text: str) -> Value:
        match = re.match(r"dense<(.*)>$", text)
        text = match.group(1) if match else text
        if text.startswith(("[", '"')):
            raise NotImplementedError(f"constant {text}")
        if kind.element in ("f16", "bf16", "f32", "f64"):
            number = _float(text, kind.element) if text.startswith("0x") else float(text)
            names = {"nan": "NAN", "inf": "INFINITY", "-inf": "-INFINITY"}
            literal = names.get(repr(number), repr(number))
        else:
            literal = {"true": "1", "false": "0"}.get(text, f"{text}LL")
        literal = self.cast(kind.element, literal.replace("-9223372036854775808LL", "INT64_MIN"))
        return Value(kind, lambda index: literal)

    # --- blocks ------------------------------------------------------------------------------

    def block(self, block: Block) -> Op | None:
        """Emits the operations; gives the one that ends the block, where it hands values on."""
        for op in block.ops:
            if op.name in ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return"):
                return op
            self._emit_op(self, op)
        return None

    def assign(self, targets: list[Value], sources: list[Value]) -> None:
        """All at once: a source may be another target."""
        own = {target.buffer for target in targets}
        values = []
        for target, source in zip(targets, sources, strict=True):
            if source.buffer in own and source.buffer != target.buffer:
                source = replace(source, buffer=None)
            values.append(self.computed(source))
        for target, value in zip(targets, values, strict=True):
            if target.buffer != value.buffer:
                self.write(target, value)

    def bind(self, names: Sequence[str], values: Sequence[Value]) -> None:
        self.env.update(zip(names, values, strict=True))

    def variables(self, names: list[str], initial: list[Value]) -> list[Value]:
        """Variables that start as copies of the values."""
        out = []
        for value in initial:
            out.append(self.new(value.type))
            self.write(out[-1], value)
        self.bind(names, out)
        return out

    # --- the whole ---------------------------------------------------------------------------

    def source(self) -> str:
        """A C file with ``launch(args, ranges, n_ranges, gx, gy, gz, backwards, counts)``."""
        arguments = self.function.args
        self.bind(
            [name for name, _ in arguments],
            [Value(kind, lambda _, i=i: f"a{i}") for i, (_, kind) in enumerate(arguments)],
        )
        for block in self.function.blocks[1:]:
            self.bind([n for n, _ in block.args], [self.new(kind) for _, kind in block.args])
        for block in self.function.blocks:
            if block.label and block is not self.function.blocks[0]:
                self.emit(f"{block.label}: ;")
            self.block(block)
        parameters = "".join(f", {C_TYPES[t.element]} a{i}" for i, (_, t) in enumerate(arguments))
        unpacked = "".join(
            f"  {C_TYPES[t.element]} a{i}; memcpy(&a{i}, args + {i}, sizeof a{i});\n"
            for i, (_, t) in enumerate(arguments)
        )
        return _FILE.format(
            prelude=Path(__file__).with_name("prelude.h").read_text(),
            parameters=parameters,
            body="\n".join(self._lines),
            unpacked=unpacked,
            arena=max(64, self._arena),
            passed="".join(f", a{i}" for i in range(len(arguments))),
        )


def _float(text: str, element: str) -> float:
    """A float from its bits."""
    bits = int(text, 16)
    if element == "bf16":
        element, bits = "f32", bits << 16
    code, size = {"f16": ("e", 2), "f32": ("f", 4), "f64": ("d", 8)}[element]
    return float(struct.unpack(code, bits.to_bytes(size, "little"))[0])


_FILE = """{prelude}
static void program(char* restrict arena, Memory* memory, int px, int py, int pz, int gx, int gy,
                    int gz{parameters}) {{
{body}
}}

void launch(const uint64_t* args, const Range* ranges, int n_ranges, int gx, int gy, int gz,
            int backwards, Counts* total) {{
{unpacked}
#pragma omp parallel
  {{
    char* arena = aligned_alloc(64, {arena});
    Memory memory = {{ranges, n_ranges}};
#pragma omp for schedule(dynamic, 1) collapse(3)
    for (int z = 0; z < gz; z++)
      for (int y = 0; y < gy; y++)
        for (int x = 0; x < gx; x++)
          program(arena, &memory, backwards ? gx - 1 - x : x, backwards ? gy - 1 - y : y,
                  backwards ? gz - 1 - z : z, gx, gy, gz{passed});
#pragma omp critical
    {{
      for (int i = 0; i < n_ranges; i++) {{
        total->loaded[i] += memory.counts.loaded[i];
        total->stored[i] += memory.counts.stored[i];
      }}
      total->outside += memory.counts.outside;
      if (memory.counts.outside) total->address = memory.counts.address;
    }}
    free(arena);
  }}
}}
"""
