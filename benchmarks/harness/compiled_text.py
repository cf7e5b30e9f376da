"""The kernels of a program as XLA compiled it for a GPU, from its text: how often each runs and what it moves.

A kernel is an instruction outside of fusions that is more than a view. Those in the body of a loop run as often as the
loop does, once where XLA does not know. What a kernel moves is the sizes of its operands and its result; of an
operand that a fusion only reads slices of, those slices; of a result that it writes in place, what it writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

VIEWS = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id",
}  # fmt: skip
SLICES = ("dynamic-slice", "slice", "gather")  # they read a part of their first operand
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that they write into their first

COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
ARRAY = re.compile(r"\b(?P<kind>pred|[a-z]+(?P<bits>\d+)[a-z0-9]*)\[(?P<sizes>[\d,]*)\]")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      arrays: the sizes of its results, in bytes.
      called: names of computations, by what they are to it.
      trips: of a loop, how often its body runs.
      number: of a parameter, its place.
    """

    name: str
    opcode: str
    arrays: tuple[int, ...]
    operands: tuple[str, ...]
    called: dict[str, str]
    trips: int
    number: int


@dataclass
class Computation:
    """Instructions by name, in their order."""

    lines: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Kernel:
    """What runs: its name without numbers, how often, and the bytes that it moves each time."""

    name: str
    runs: int
    bytes: int


class CompiledText:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the first.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = Computation()
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                current = self.computations[found["name"]] = Computation()
                self.entry = found["name"] if found["entry"] else self.entry
            elif found := INSTRUCTION.match(line):
                current.lines[found["name"]] = _instruction(found)
                current.root = found["name"] if found["root"] else current.root

    def kernels(self) -> Iterator[Kernel]:
        """All kernels, loops and branches followed. Of a branch the one with the most kernels is taken."""
        yield from self._kernels(self.entry, 1)

    def _kernels(self, name: str, runs: int) -> Iterator[Kernel]:
        computation = self.computations[name]
        for line in computation.lines.values():
            if line.opcode == "while":
                yield from self._kernels(line.called["body"], runs * line.trips)
            elif line.opcode == "call":
                yield from self._kernels(line.called["to_apply"], runs)
            elif line.opcode == "conditional":
                branches = [list(self._kernels(each, runs)) for each in line.called.values()]
                yield from max(branches, key=len)
            elif line.opcode not in VIEWS:
                yield Kernel(re.sub(r"([._]\d+)+$", "", line.name), runs, self._bytes(computation, line))

    def _bytes(self, computation: Computation, line: Instruction) -> int:
        sizes = [sum(computation.lines[operand].arrays) for operand in line.operands]
        inner = self.computations.get(line.called.get("calls", ""))
        if line.opcode != "fusion" or inner is None:
            return sum(sizes) + line.arrays[0] if line.opcode == "custom-call" else sum(sizes) + sum(line.arrays)
        parameters = [each for each in inner.lines.values() if each.opcode == "parameter"]
        parameters.sort(key=lambda each: each.number)
        read = sum(min(size, _read(inner, each)) for size, each in zip(sizes, parameters, strict=True))
        return read + sum(_written(inner, each) for each in _results(inner, inner.root))


def _instruction(found: re.Match[str]) -> Instruction:
    inside, attributes = _split(found["rest"])
    called = dict(re.findall(r"(calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", attributes))
    if branches := re.search(r"branch_computations=\{(.*?)\}", attributes):
        called |= {f"branch {number}": name.strip(" %") for number, name in enumerate(branches[1].split(","))}
    trips = TRIPS.search(attributes)
    return Instruction(
        name=found["name"],
        opcode=found["opcode"],
        arrays=tuple(_size(array) for array in ARRAY.finditer(found["shape"])) or (0,),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        called=called,
        trips=int(trips[1]) if trips else 1,
        number=int(inside) if found["opcode"] == "parameter" else 0,
    )


def _split(rest: str) -> tuple[str, str]:
    """What stands inside the parentheses of an instruction, and what after them."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return rest[:place], rest[place:]
    return rest, ""


def _size(array: re.Match[str]) -> int:
    bits = int(array["bits"] or 8)
    return math.prod(int(size) for size in array["sizes"].split(",") if size) * max(bits // 8, 1)


def _users(inner: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """The instructions that read another one, views of it followed, and the place in which each has it."""
    for line in inner.lines.values():
        for place, operand in enumerate(line.operands):
            if operand == name and line.opcode == "bitcast":
                yield from _users(inner, line.name)
            elif operand == name:
                yield line, place


def _read(inner: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that are read."""
    total = 0
    for user, place in _users(inner, parameter.name):
        if place == 0 and user.opcode in SLICES:
            total += sum(user.arrays)
        elif place != 0 or user.opcode not in IN_PLACE:
            return sum(parameter.arrays)
    return total


def _results(inner: Computation, name: str) -> Sequence[str]:
    """The instructions that give the results of a fusion."""
    line = inner.lines[name]
    if line.opcode == "tuple":
        return [each for operand in line.operands for each in _results(inner, operand)]
    return _results(inner, line.operands[0]) if line.opcode == "bitcast" else [name]


def _written(inner: Computation, name: str) -> int:
    line = inner.lines[name]
    if (place := IN_PLACE.get(line.opcode)) is not None:
        return sum(inner.lines[line.operands[place]].arrays)
    return line.arrays[0] if line.opcode == "custom-call" else sum(line.arrays)
