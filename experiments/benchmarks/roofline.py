"""A roofline over the optimised HLO of a GPU program: what each kernel moves, computes and takes.

    python experiments/benchmarks/roofline.py FILE    # an HLO module as text

A kernel takes the longest of four times, and a launch:

- bytes: of its operands and results, at a share of the card's bandwidth. An operand of which a
  fusion only reads slices counts as those, a result that is updated in place as what is written.
  That caches hold some of it is not modelled.
- products: FLOP of matrix products and convolutions, on the tensor cores, at the rate that is
  reached in practice.
- operations: all else that is computed element by element, on the ordinary cores; a producer that
  a fusion reads at several shifts is computed once for each.
- cache: of a Pallas kernel, what all of its programs load, at the bandwidth of the second level
  cache. It states that, its products and its operations itself (`networks.fused`).

Kernels inside a loop count as often as its trip count says. What a library's kernel does inside
(cuDNN's own copies, sorting) is not seen; a Triton or cuBLAS product is taken as one pass over its
operands.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

_BYTES = dict.fromkeys(["pred", "s8", "u8", "f8e4m3fn", "f8e5m2"], 1.0)
_BYTES |= dict.fromkeys(["s16", "u16", "bf16", "f16"], 2.0)
_BYTES |= dict.fromkeys(["s32", "u32", "f32"], 4.0)
_BYTES |= dict.fromkeys(["s64", "u64", "f64", "c64"], 8.0)
_BYTES |= {"c128": 16.0, "s4": 0.5, "u4": 0.5, "token": 0.0, "opaque": 0.0}
_ARRAY = re.compile(rf"\b({'|'.join(sorted(_BYTES, key=len, reverse=True))})\[([\d,]*)\]")
_FREE = set(
    [
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "optimization-barrier",
        "domain",
    ]
)
_SLICES = {"slice", "dynamic-slice", "gather"}
_SHIFTING = _SLICES | set(["pad", "reverse", "transpose", "concatenate", "reshape"])
_MOVES = _FREE | _SHIFTING | set(["broadcast", "copy", "iota", "dynamic-update-slice"])
# Instructions of one element, in units of a fused multiply and add.
_WEIGHTS = dict.fromkeys(["sqrt", "rsqrt", "exponential", "log"], 4)
_WEIGHTS |= dict.fromkeys(["divide", "remainder", "tanh", "logistic", "cosine", "sine"], 8)
_WEIGHTS |= dict.fromkeys(["exponential-minus-one", "log-plus-one"], 8)
_WEIGHTS |= dict.fromkeys(["power", "erf"], 12)
# A concatenation finds the operand of each element: 0.8e12 elements a second on an H200, whatever
# their type.
_WEIGHTS |= {"concatenate": 11}


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
    cached_bytes_per_second: float = math.inf
    """Bandwidth of the cache that the multiprocessors share."""


# Data sheets: 3.35 and 4.8 TB/s; 989 TFLOP/s dense in bfloat16 and half of that in TF32; 132
# multiprocessors of 128 lanes at 1.755 GHz. What is reached of them was measured kernel by kernel
# on an H200 (accelerator/h200.json): 90 % of the bandwidth, 65 % of the products, 30 % of the
# lanes. For the H100 the same shares are assumed. The cache gives at least what cuBLAS drew from it
# there: products at 647 TFLOP/s in tiles of 128x160, pairs of which share the wider operand.
_PRODUCTS = {"bf16": 650e12, "f16": 650e12, "f32": 325e12, "f64": 30e12, "s8": 1300e12}
_SHARED: dict[str, Any] = {
    "products": _PRODUCTS,
    "operations": 0.3 * 132 * 128 * 1.755e9,
    "cached_bytes_per_second": 647e12 * (128 + 160 / 2) / (128 * 160),
}
H100 = Card("NVIDIA H100 80GB HBM3", 79e9, 0.9 * 3.35e12, **_SHARED)
H200 = Card("NVIDIA H200", 139e9, 0.9 * 4.8e12, **_SHARED)
CARDS = {"h100": H100, "h200": H200}

Bound = Literal["bytes", "products", "operations", "cache", "launches"]


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
    """Dimensions of each array of a shape, which may be a tuple's."""
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
    loaded: float = 0.0  # bytes, by all programs of a Pallas kernel

    def seconds(self, card: Card) -> float:
        """Seconds of one launch."""
        return max(t for t, _ in self._parts(card)) + card.launch_seconds

    def bound(self, card: Card) -> Bound:
        longest, name = max(self._parts(card))
        return name if longest > card.launch_seconds else "launches"

    def _parts(self, card: Card) -> list[tuple[float, Bound]]:
        return [
            (self.bytes / card.bytes_per_second, "bytes"),
            (self.flop / card.products[self.products], "products"),
            (self.operations / card.operations, "operations"),
            (self.loaded / card.cached_bytes_per_second, "cache"),
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
        """Shares of the time by what bounds kernels; that between them counts as launches, too."""
        parts: dict[Bound, float] = dict.fromkeys(
            ("bytes", "products", "operations", "cache", "launches"), 0.0
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
    """Roofline of the text of an optimised HLO module.

    turns: trip counts of loops for which the program does not tell them, by a regular expression
    that is found in their `op_name`; the first that fits counts, 1 where none does.
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
    called = one.attribute(r"calls=%?([\w.\-]+)") if "fusion" in one.opcode else None
    if called:
        body = module.computations[called]
        parameters = {
            int(i.line.split("parameter(")[1].split(")")[0]): i.name
            for i in body.values()
            if i.opcode == "parameter"
        }
        read = {name: parameters[place] for place, name in enumerate(one.operands)}
    else:  # a fusion of one instruction
        body = {name: own[name]._replace(opcode="parameter") for name in one.operands}
        body[one.name] = one._replace(is_root=True)
        read = {name: name for name in one.operands}
    flop, kind = _products(module, body)
    stated = _stated(one)
    if stated:
        kind = next(iter(_ARRAY.findall(own[one.operands[0]].shape)))[0]
    return Kernel(
        name=one.name,
        shape=one.shape,
        times=times,
        bytes=sum(_read(body, name) for name in read.values()) + _written(body),
        flop=flop + stated.get("flop", 0.0),
        operations=_operations(module, body) + stated.get("operations", 0.0),
        loaded=stated.get("loaded", 0.0),
        source=one.attribute(r'op_name="([^"]*)"') or "",
        products=kind,
    )


def _stated(one: Instruction) -> dict[str, float]:
    """What a Pallas kernel states of a program of its grid, times their number."""
    if "$xla.gpu.triton" not in one.line:
        return {}
    programs = math.prod(int(size) for size in re.findall(r"grid_[xyz] = (\d+)", one.line))
    found = re.search(r'metadata = "(\{.*?\})"', one.line)
    stated = json.loads(found.group(1).replace("\\22", '"')) if found else {}
    return {name: programs * float(value) for name, value in stated.items()}


def _root(body: dict[str, Instruction]) -> Instruction:
    return next((one for one in body.values() if one.is_root), list(body.values())[-1])


def _read(body: dict[str, Instruction], parameter: str) -> float:
    """Bytes of a parameter that are read: of slices alone where nothing else uses it."""
    total, whole, waiting = 0.0, size_of(body[parameter].shape), [parameter]
    while waiting:
        name = waiting.pop()
        for user in body.values():
            if name not in user.operands or user.opcode == "parameter":
                continue
            if user.opcode in ("bitcast", "reshape") and not user.is_root:
                waiting.append(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += size_of(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
    return min(total, whole)


def _written(body: dict[str, Instruction]) -> float:
    """Bytes of the results: of those that are updated in place, of the update."""
    root = _root(body)
    total = 0.0
    for one in [body[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while one.opcode == "bitcast" and one.operands[0] in body:
            one = body[one.operands[0]]
        in_place = one.opcode == "dynamic-update-slice"
        total += size_of(body[one.operands[1]].shape if in_place else one.shape)
    return total


def _operations(
    module: Module, body: dict[str, Instruction], demand_of_root: float | None = None
) -> float:
    """On single elements; a producer counts once for each place that it is needed at."""
    users: dict[str, list[str]] = defaultdict(list)
    for one in body.values():
        for name in one.operands:
            users[name].append(one.opcode)
    same: dict[str, float] = defaultdict(float)  # needed where its users are computed
    shifted: dict[str, float] = defaultdict(float)  # needed elsewhere, once for each such use
    root = _root(body)
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        needed = demand_of_root if root.name == name else None
        same[name] = float(elements_of(body[name].shape)) if needed is None else needed
    total = 0.0
    for one in reversed(body.values()):
        demand = same[one.name] + shifted[one.name]
        if not demand or one.opcode in ("parameter", "custom-call", "convolution"):
            continue
        if one.opcode in ("fusion", "call"):
            total += sum(
                _operations(module, module.computations[called], demand) for called in one.called()
            )
        elif one.opcode == "reduce":
            inputs = one.operands[: len(one.operands) // 2]
            share = demand / max(1, elements_of(one.shape) // len(inputs))
            demand = elements_of(body[inputs[0]].shape) * share
            total += demand * len(inputs)
        elif one.opcode in _WEIGHTS or one.opcode not in _MOVES | {"dot"}:
            in_another = one.opcode == "multiply" and users[one.name] in (["add"], ["subtract"])
            total += 0 if in_another else _WEIGHTS.get(one.opcode, 1) * demand
        for place, name in enumerate(one.operands):
            if name not in body:
                continue
            elements = float(elements_of(body[name].shape))
            if one.opcode == "dot":  # its operands are read as tiles
                same[name] = max(same[name], elements)
            elif one.opcode == "broadcast":  # kept in a register where it does not change
                same[name] = max(same[name], min(demand, elements))
            elif one.opcode in _SLICES | {"dynamic-update-slice"} and place > 0:
                shifted[name] += min(demand, elements)
            elif one.opcode == "concatenate":
                shifted[name] += demand * elements / max(1, elements_of(one.shape))
            elif one.opcode in _SHIFTING:
                shifted[name] += demand
            else:
                same[name] = max(same[name], demand)
    return total


def _products(module: Module, body: dict[str, Instruction]) -> tuple[float, str]:
    """FLOP of matrix products and convolutions, and the type of their operands."""
    total, kind = 0.0, "bf16"
    for one in body.values():
        if one.opcode in ("dot", "convolution", "custom-call"):
            found = _product(one, body)
        elif one.opcode in ("fusion", "call"):
            (called,) = one.called()
            found = _products(module, module.computations[called])
        else:
            continue
        if found[0]:
            total, kind = total + found[0], found[1]
    return total, kind


def _product(one: Instruction, own: dict[str, Instruction]) -> tuple[float, str]:
    """FLOP of a product or a convolution, whoever computes it, and the type of its operands."""
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
    # Products of a convolution: elements of its output in the forward direction times the kernel's
    # inputs.
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
            f"| {times:,} | {len(kernels)} | {part.total('bytes') / 1e9:.3f} | "
            f"{part.total('flop') / 1e9:.2f} | {part.total('operations') / 1e9:.2f} | "
            f"{1e6 * taken:,.0f} | {times * taken:.3f} |"
        )
    lines += [
        "",
        "| kernel | launches | us | bound by | MB | GFLOP | M operations | from |",
        "|---" * 8 + "|",
    ]
    for kernel in program.largest(card, rows):
        lines.append(
            f"| {kernel.name} {kernel.shape[:48]} | {kernel.times:,} | "
            f"{1e6 * kernel.seconds(card):.1f} | {kernel.bound(card)} | "
            f"{kernel.bytes / 1e6:.1f} | {kernel.flop / 1e9:.2f} | "
            f"{kernel.operations / 1e6:.1f} | {kernel.source[-60:]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(roofline(Path(sys.argv[1]).read_text()), H100))
