"""A roofline over optimised HLO of a GPU program: what each kernel moves and computes, and how long it takes at least.

    python experiments/benchmarks/roofline.py FILE    # an HLO module as text; prints its loops and largest kernels

A kernel takes the longest of three times, and a launch:

- bytes: of its operands and results, at a share of the card's bandwidth. An operand of which a fusion only reads
  slices counts as those, a result that is updated in place as what is written. Caches are not modelled.
- products: FLOP of matrix products and convolutions, on the tensor cores, at the rate that is reached in practice.
- operations: all else that is computed element by element, on the ordinary cores; a producer that a fusion reads at
  several shifts is computed once for each.

Kernels inside a loop count as often as its trip count says. What a library's kernel does inside (cuDNN's own copies,
sorting) is not seen; a Triton or cuBLAS product is taken as one pass over its operands.
"""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
}
_BYTES |= {
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
    "token": 0,
}
_BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "opaque": 0}
_ARRAY = re.compile(r"\b(" + "|".join(sorted(_BYTES, key=len, reverse=True)) + r")\[([\d,]*)\]")
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
}
_FREE |= {"replica-id", "optimization-barrier", "domain"}
_MOVES = {
    "broadcast",
    "reshape",
    "transpose",
    "slice",
    "copy",
    "bitcast",
    "concatenate",
    "pad",
    "reverse",
    "iota",
}
_MOVES |= {
    "dynamic-slice",
    "dynamic-update-slice",
    "gather",
    "tuple",
    "get-tuple-element",
    "parameter",
    "constant",
}
_SHIFTING = {
    "slice",
    "dynamic-slice",
    "pad",
    "reverse",
    "transpose",
    "gather",
    "concatenate",
    "reshape",
}
# Instructions of one element, in units of a fused multiply and add.
_WEIGHTS = {
    "divide": 8,
    "sqrt": 4,
    "rsqrt": 4,
    "exponential": 4,
    "log": 4,
    "tanh": 8,
    "power": 12,
    "logistic": 8,
}
_WEIGHTS |= {
    "cosine": 8,
    "sine": 8,
    "erf": 12,
    "exponential-minus-one": 8,
    "log-plus-one": 8,
    "remainder": 8,
}


@dataclass(frozen=True)
class Card:
    """What a card reaches: rates a second, in practice and not on its data sheet."""

    name: str
    memory_bytes: float
    bytes_per_second: float
    products: dict[str, float]
    """FLOP of matrix products a second, by the type of their operands."""
    operations: float
    """Instructions on single elements a second."""
    launch_seconds: float = 2e-6
    """From one kernel to the next, in a stream of kernels that are enqueued ahead."""


# Data sheets: 3.35 and 4.8 TB/s; 989 TFLOP/s dense in bfloat16 and half of that in TF32; 132 multiprocessors of 128
# lanes at 1.755 GHz. 85 % of the bandwidth and 60 % of the products are reached by good kernels, and half of the lanes.
_PRODUCTS = {"bf16": 600e12, "f16": 600e12, "f32": 300e12, "f64": 30e12, "s8": 1200e12}
H100 = Card("NVIDIA H100 80GB HBM3", 79e9, 0.85 * 3.35e12, _PRODUCTS, 0.5 * 132 * 128 * 1.755e9)
H200 = Card("NVIDIA H200", 139e9, 0.85 * 4.8e12, _PRODUCTS, 0.5 * 132 * 128 * 1.755e9)
CARDS = {"h100": H100, "h200": H200}

Bound = Literal["bytes", "products", "operations", "launches"]


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the line."""
        found = re.search(pattern, self.line)
        return found.group(1) if found else None

    def called(self) -> list[str]:
        """Computations that it calls."""
        one = r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
        names = re.findall(one, self.line)
        for group in re.findall(
            r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.line
        ):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


def dimensions(shape: str) -> list[list[int]]:
    """Of each array of a shape, which may be a tuple's."""
    return [[int(d) for d in dims.split(",") if d] for _, dims in _ARRAY.findall(shape)]


def size_of(shape: str) -> float:
    """Bytes of a shape."""
    total = 0.0
    for (kind, _), dims in zip(_ARRAY.findall(shape), dimensions(shape), strict=True):
        total += _BYTES[kind] * math.prod(dims)
    return total


def elements_of(shape: str) -> int:
    return sum(math.prod(dims) for dims in dimensions(shape))


class Module:
    """An HLO module, parsed from its text."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line)
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if head:
                current = self.computations.setdefault(head.group(2), {})
                self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _instruction(line.strip())):
                current[found.name] = found
        if not self.entry:
            raise ValueError("no ENTRY computation in what should be the text of an HLO module")

    def root(self, computation: str) -> Instruction:
        instructions = self.computations[computation].values()
        return next((one for one in instructions if one.is_root), list(instructions)[-1])


def _balanced(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"(ROOT )?%?([\w.\-]+) = (.*)", line)
    if not head:
        return None
    root, name, rest = head.groups()
    end = _balanced(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    call = re.match(r"([\w\-]+)\(", rest)
    if not call:
        return None
    inside = rest[call.end() : _balanced(rest, call.end() - 1) - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, shape, call.group(1), operands, line, bool(root))


@dataclass
class Kernel:
    """One kernel, and how often it is launched in all."""

    name: str
    shape: str
    times: int
    bytes: float
    flop: float
    operations: float
    source: str
    products: str = "bf16"  # type of the operands of its products

    def seconds(self, card: Card) -> float:
        """Of one launch."""
        return max(t for t, _ in self._parts(card)) + card.launch_seconds

    def bound(self, card: Card) -> Bound:
        longest, name = max(self._parts(card))
        return name if longest > card.launch_seconds else "launches"

    def _parts(self, card: Card) -> list[tuple[float, Bound]]:
        return [
            (self.bytes / card.bytes_per_second, "bytes"),
            (self.flop / card.products[self.products], "products"),
            (self.operations / card.operations, "operations"),
        ]


@dataclass
class Roofline:
    """The kernels of a program."""

    kernels: list[Kernel] = field(default_factory=list)

    def total(self, name: Literal["bytes", "flop", "operations"]) -> float:
        return sum(kernel.times * getattr(kernel, name) for kernel in self.kernels)

    @property
    def launches(self) -> int:
        return sum(kernel.times for kernel in self.kernels)

    def seconds(self, card: Card) -> float:
        return sum(kernel.times * kernel.seconds(card) for kernel in self.kernels)

    def shares(self, card: Card) -> dict[Bound, float]:
        """Of the time, by what bounds the kernels; the launches' is the time between kernels too."""
        parts: dict[Bound, float] = dict.fromkeys(
            ("bytes", "products", "operations", "launches"), 0.0
        )
        for kernel in self.kernels:
            bound, whole = kernel.bound(card), kernel.seconds(card)
            waiting = whole if bound == "launches" else card.launch_seconds
            parts["launches"] += kernel.times * waiting
            parts[bound] += kernel.times * (whole - waiting)
        total = sum(parts.values()) or 1.0
        return {name: part / total for name, part in parts.items()}

    def largest(self, card: Card, count: int = 10) -> list[Kernel]:
        return sorted(self.kernels, key=lambda k: -k.times * k.seconds(card))[:count]

    def loops(self) -> dict[int, list[Kernel]]:
        """Kernels by how often they are launched: those of one loop body share it."""
        found = defaultdict(list)
        for kernel in self.kernels:
            found[kernel.times].append(kernel)
        return dict(sorted(found.items()))


def roofline(text: str, turns: Mapping[str, int] | None = None) -> Roofline:
    """Of the text of an optimised HLO module.

    turns: of loops whose trip count the program does not tell, by a regular expression that is found in their
    `op_name`; the first that fits counts, 1 where none does.
    """
    module = Module(text)
    return Roofline(list(_kernels(module, module.entry, 1, turns or {})))


def _kernels(
    module: Module, computation: str, times: int, turns: Mapping[str, int]
) -> Iterator[Kernel]:
    own = module.computations[computation]
    for one in own.values():
        opcode = one.opcode
        if opcode in _FREE or opcode.endswith("-done") or opcode.endswith("-update"):
            continue
        if opcode == "while":
            trips = one.attribute(r'known_trip_count":\{"n":"(\d+)"')
            body = one.attribute(r"body=%?([\w.\-]+)")
            assert body
            name = one.attribute(r'op_name="([^"]*)"') or ""
            known = (number for pattern, number in turns.items() if re.search(pattern, name))
            count = int(trips) if trips else next(known, 1)
            yield from _kernels(module, body, times * count, turns)
        elif opcode == "conditional":
            branches = [list(_kernels(module, b, times, turns)) for b in one.called()]
            yield from max(branches, key=lambda kernels: sum(k.bytes for k in kernels), default=[])
        elif opcode in ("call", "async-start"):
            for called in one.called():
                yield from _kernels(module, called, times, turns)
        else:
            yield _kernel(module, own, one, times)


def _kernel(module: Module, own: dict[str, Instruction], one: Instruction, times: int) -> Kernel:
    shapes = [own[name].shape if name in own else "" for name in one.operands]
    inside = _Inside(module, one)
    moved = inside.read(shapes) + inside.written()
    flop, kind = inside.products(own)
    source = one.attribute(r'op_name="([^"]*)"') or ""
    return Kernel(one.name, one.shape, times, moved, flop, inside.operations(), source, kind)


class _Inside:
    """What one kernel does: a fusion's computation, or a single instruction."""

    def __init__(self, module: Module, one: Instruction):
        self.module, self.one = module, one
        self.computation = one.attribute(r"calls=%?([\w.\-]+)") if "fusion" in one.opcode else None
        self.body = module.computations[self.computation] if self.computation else {}

    def read(self, shapes: list[str]) -> float:
        if not self.body:
            if self.one.opcode in ("dynamic-slice", "slice", "gather"):
                return size_of(self.one.shape) + sum(size_of(shape) for shape in shapes[1:])
            if self.one.opcode == "dynamic-update-slice":
                return size_of(shapes[1])
            return sum(size_of(shape) for shape in shapes)
        total = 0.0
        for place, shape in enumerate(shapes):
            parameter = next(
                (
                    i.name
                    for i in self.body.values()
                    if i.opcode == "parameter" and f"parameter({place})" in i.line
                ),
                None,
            )
            total += (
                size_of(shape) if parameter is None else self._read_of(parameter, size_of(shape))
            )
        return total

    def _read_of(self, parameter: str, whole: float) -> float:
        """Bytes of a parameter that are read: of slices alone where nothing else uses it."""
        total, waiting = 0.0, [parameter]
        while waiting:
            name = waiting.pop()
            for user in self.body.values():
                if name not in user.operands:
                    continue
                if (
                    user.opcode in ("bitcast", "reshape", "copy", "convert")
                    and user.opcode != "convert"
                ):
                    if user.is_root:
                        return whole
                    waiting.append(user.name)
                elif (
                    user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name
                ):
                    total += size_of(user.shape)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue
                else:
                    return whole
        return min(total, whole)

    def written(self) -> float:
        if self.one.opcode == "dynamic-update-slice":
            return size_of(self.one.shape) and 0.0 + self._update(self.one)
        if not self.body:
            return size_of(self.one.shape)
        assert self.computation
        root = self.module.root(self.computation)
        results = [self.body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return sum(
            size_of(self.body[r.operands[1]].shape)
            if r.opcode == "dynamic-update-slice"
            else size_of(r.shape)
            for r in map(self._behind_bitcasts, results)
        )

    def _update(self, one: Instruction) -> float:
        for computation in self.module.computations.values():
            if one.name in computation and computation[one.name] is one:
                return size_of(computation[one.operands[1]].shape)
        return size_of(one.shape)

    def _behind_bitcasts(self, one: Instruction) -> Instruction:
        while one.opcode == "bitcast" and one.operands[0] in self.body:
            one = self.body[one.operands[0]]
        return one

    def operations(self) -> float:
        """Instructions on single elements, each producer counted once for each place that it is needed at."""
        if not self.body:
            one = self.one
            heavy = one.opcode in _MOVES or one.opcode in ("custom-call", "dot", "convolution")
            return 0.0 if heavy else _WEIGHTS.get(one.opcode, 1) * float(elements_of(one.shape))
        assert self.computation
        return _operations(self.module, self.computation, None)

    def products(self, own: dict[str, Instruction]) -> tuple[float, str]:
        """FLOP of matrix products and convolutions, and the type of their operands."""
        if self.body:
            assert self.computation
            return _dots(self.module, self.computation)
        return _product(self.one, own)


def _operations(module: Module, computation: str, demand_of_root: float | None) -> float:
    body = module.computations[computation]
    order = list(body.values())
    same: dict[str, float] = defaultdict(float)  # needed where its users are computed
    shifted: dict[str, float] = defaultdict(float)  # needed elsewhere, once for each such use
    root = module.root(computation)
    same[root.name] = float(elements_of(root.shape)) if demand_of_root is None else demand_of_root
    if root.opcode == "tuple":
        for name in root.operands:
            same[name] = max(same[name], float(elements_of(body[name].shape)))
    users: dict[str, list[str]] = defaultdict(list)
    for one in order:
        for name in one.operands:
            users[name].append(one.opcode)
    total = 0.0
    for one in reversed(order):
        demand = same[one.name] + shifted[one.name]
        if not demand or (one is root and root.opcode == "tuple"):
            continue
        if one.opcode not in _MOVES and one.opcode not in ("dot", "fusion", "call", "reduce"):
            fused = one.opcode == "multiply" and users[one.name] in (["add"], ["subtract"])
            total += 0 if fused else _WEIGHTS.get(one.opcode, 1) * demand
        if one.opcode == "reduce":
            inputs = one.operands[: len(one.operands) // 2]
            ratio = demand / max(1, elements_of(one.shape) // len(inputs))
            reduced = float(elements_of(body[inputs[0]].shape)) * ratio
            total += reduced * len(inputs)
            for name in inputs:
                same[name] = max(same[name], reduced)
            continue
        if one.opcode == "dot":
            for name in one.operands:
                same[name] = max(same[name], float(elements_of(body[name].shape)))
            continue
        if one.opcode in ("fusion", "call"):
            for called in one.called():
                total += _operations(module, called, demand)
        for place, name in enumerate(one.operands):
            if name not in body:
                continue
            if one.opcode == "broadcast":  # kept in registers where it does not change
                needed = min(demand, float(elements_of(body[name].shape)))
                same[name] = max(same[name], needed)
            elif one.opcode in ("dynamic-slice", "dynamic-update-slice", "gather") and place > 0:
                own = elements_of(body[name].shape)
                shifted[name] += min(demand, float(own))
            elif one.opcode == "concatenate":
                part = elements_of(body[name].shape) / max(1, elements_of(one.shape))
                shifted[name] += demand * part
            elif one.opcode in _SHIFTING:
                shifted[name] += demand
            else:
                same[name] = max(same[name], demand)
    return total


def _dots(module: Module, computation: str) -> tuple[float, str]:
    own, total, kind = module.computations[computation], 0.0, "bf16"
    for one in own.values():
        found = _product(one, own) if one.opcode in ("dot", "convolution", "custom-call") else None
        if found is None:
            for called in one.called() if one.opcode in ("fusion", "call") else ():
                found = _dots(module, called)
        if found and found[0]:
            total, kind = total + found[0], found[1]
    return total, kind


def _product(one: Instruction, own: dict[str, Instruction]) -> tuple[float, str]:
    """Of a product or a convolution, whoever computes it."""
    shapes = [own[name].shape for name in one.operands if name in own]
    if len(shapes) < 2:
        return 0.0, "bf16"
    kind = _ARRAY.findall(shapes[0])[0][0] if _ARRAY.findall(shapes[0]) else "bf16"
    kind = kind if kind in _PRODUCTS else "f32"
    left, right, out = dimensions(shapes[0])[0], dimensions(shapes[1])[0], dimensions(one.shape)[0]
    contracting = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    if contracting is None:
        listed = one.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        contracting = listed.replace('"', "") if listed else None
    if one.opcode == "dot" or (one.opcode == "custom-call" and contracting is not None):
        depth = math.prod(left[int(d)] for d in (contracting or "").split(",") if d)
        return 2.0 * math.prod(out) * depth, kind
    target = one.attribute(r'custom_call_target="__cudnn\$conv(\w+)"')
    labels = one.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    if (target is None and one.opcode != "convolution") or labels is None:
        return 0.0, kind
    # Products of a convolution: elements of its output in the forward direction times the kernel's inputs.
    operands, results = labels.split("->")
    first, second = operands.split("_")
    if target is None or target.startswith("Forward"):
        outputs, kernel, kernel_labels = out, right, second
    elif target.startswith("BackwardInput"):
        outputs, kernel, kernel_labels = left, right, second
    else:
        outputs, kernel, kernel_labels = right, out, second
    del first, results
    return 2.0 * math.prod(outputs) * math.prod(kernel) / kernel[kernel_labels.index("o")], kind


def table(program: Roofline, card: Card, rows: int = 10) -> str:
    """The loops and the largest kernels, in Markdown."""
    lines = [
        "| launches | kernels | GB | GFLOP of products | G operations | us a turn | s in all |",
        "|---" * 7 + "|",
    ]
    for times, kernels in program.loops().items():
        part = Roofline([Kernel(**{**vars(k), "times": 1}) for k in kernels])
        taken = part.seconds(card)
        lines.append(
            f"| {times:,} | {len(kernels)} | {part.total('bytes') / 1e9:.3f} | {part.total('flop') / 1e9:.2f} | "
            f"{part.total('operations') / 1e9:.2f} | {1e6 * taken:,.0f} | {times * taken:.3f} |"
        )
    lines += [
        "",
        "| kernel | launches | us | bound by | MB | GFLOP | M operations | from |",
        "|---" * 8 + "|",
    ]
    for kernel in program.largest(card, rows):
        lines.append(
            f"| {kernel.name} {kernel.shape[:48]} | {kernel.times:,} | {1e6 * kernel.seconds(card):.1f} | "
            f"{kernel.bound(card)} | {kernel.bytes / 1e6:.1f} | {kernel.flop / 1e9:.2f} | "
            f"{kernel.operations / 1e6:.1f} | {kernel.source[-60:]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(
        table(
            roofline(Path(sys.argv[1]).read_text()),
            H100,
            int(sys.argv[2]) if len(sys.argv) > 2 else 10,
        )
    )
