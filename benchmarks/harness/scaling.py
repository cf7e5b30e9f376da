"""The time of an update on n devices of one host, as a model so small that few measurements identify it.

    t(n, B) = max(floor, fixed + example * B / n) + bytes * 2 (n - 1) / n / bandwidth + latency * log2(n)

    B          examples of the update on all devices together, each of which computes B / n
    floor      seconds that no batch goes below: weights go through memory, kernels are launched
    fixed      seconds of an update whatever its batch
    example    seconds of an example on its device
    bytes      of the gradients, which an all-reduce adds up; of a ring, each device sends 2 (n - 1) / n as many
    bandwidth  bytes a second of the all-reduce
    latency    seconds of it for each doubling of the devices, whatever its bytes

Only those terms are fitted that the measurements tell apart. On 1 and 2 devices with the same bytes, bandwidth and
latency have the same effect: then the whole of it is put down to the bandwidth, and `StepTime.readings` has both
extremes for more devices. Communication that overlaps with computation is not in the model: what an overlap hides is
missing in the measured all-reduce, and counts as hidden on more devices too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from scipy.optimize import nnls

LEAST_SINGULAR_VALUE = 1e-3  # of columns of length 1: below it, they cannot be told apart


@dataclass(frozen=True)
class Row:
    """A measured update.

    Attributes:
      batch: examples on all devices together.
      bytes: that the all-reduce adds up.
    """

    devices: int
    batch: int
    seconds: float
    bytes: float = 0.0

    @property
    def examples(self) -> float:
        """On each device."""
        return self.batch / self.devices


# The terms that are sums, in the order in which they are tried: what each multiplies in the time of a row.
TERMS: dict[str, Callable[[Row], float]] = {
    "fixed": lambda row: 1.0,
    "example": lambda row: row.examples,
    "byte": lambda row: ring_bytes(row.devices, row.bytes),
    "latency": lambda row: math.log2(row.devices),
}


def ring_bytes(devices: int, size: float) -> float:
    """The bytes that each device sends in an all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


@dataclass(frozen=True)
class StepTime:
    """The model with its parameters, all in seconds; `byte` is 1 / bandwidth.

    Attributes:
      terms: those that the measurements identify, `floor` among them; the others are 0.
    """

    floor: float = 0.0
    fixed: float = 0.0
    example: float = 0.0
    byte: float = 0.0
    latency: float = 0.0
    terms: tuple[str, ...] = ()

    def compute(self, examples: float) -> float:
        """Seconds of an update on one device."""
        return max(self.floor, self.fixed + self.example * examples)

    def all_reduce(self, devices: int, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes within a host."""
        return self.byte * ring_bytes(devices, size) + self.latency * math.log2(devices)

    def seconds(self, devices: int, batch: float, size: float) -> float:
        """Seconds of an update of a batch on devices of one host."""
        return self.compute(batch / devices) + self.all_reduce(devices, size)

    def error(self, row: Row) -> float:
        """How much longer than measured the model takes, as a share of it."""
        return self.seconds(row.devices, row.batch, row.bytes) / row.seconds - 1

    def readings(self, size: float) -> tuple[StepTime, ...]:
        """The models that fit the measurements equally well: this, and where two devices do not tell latency from
        bandwidth, the one whose all-reduce is latency only."""
        if "byte" not in self.terms or "latency" in self.terms:
            return (self,)
        return self, replace(self, byte=0.0, latency=self.all_reduce(2, size))


@dataclass(frozen=True)
class Network:
    """What is assumed beyond one host, where nothing was measured.

    An all-reduce is then one within each host and one between the hosts, whose devices send a part each.

    Attributes:
      host_devices: in a host.
      bandwidth: bytes a second that a host can send, all its devices together.
      latency: seconds for each doubling of the hosts.
    """

    host_devices: int = 8
    bandwidth: float = 50e9
    latency: float = 20e-6

    def all_reduce(self, devices: int, size: float) -> float:
        """Seconds that an all-reduce takes between the hosts, beside that within them."""
        hosts = -(-devices // self.host_devices)
        return ring_bytes(hosts, size) / self.bandwidth + self.latency * math.log2(hosts)

    def seconds(self, model: StepTime, devices: int, batch: float, size: float) -> float:
        """Seconds of an update of a batch on devices of as many hosts as they need."""
        within = model.all_reduce(min(devices, self.host_devices), size)
        return model.compute(batch / devices) + within + self.all_reduce(devices, size)


def fit(rows: Sequence[Row], allowed: Sequence[str] = ("floor", *TERMS)) -> StepTime:
    """The model of some rows: least squares of relative errors, no parameter below 0.

    A floor is in it where it predicts rows that are left out better than the model without.

    Args:
      allowed: terms that may be in it.
    """
    plain, floored = _fit_sum(rows, allowed), _fit_with_floor(rows, allowed)
    if "floor" not in floored.terms:
        return plain
    errors = [left_out_errors(rows, partial(way, allowed=allowed)) for way in (_fit_sum, _fit_with_floor)]
    without, with_floor = (sum(error**2 for error in each if error is not None) for each in errors)
    return floored if with_floor < without else plain


def left_out_errors(rows: Sequence[Row], way: Callable[[Sequence[Row]], StepTime] = fit) -> list[float | None]:
    """Of each row, the error of the model of all others; None where they do not identify a term that all rows do."""
    whole, errors = set(way(rows).terms) - {"floor"}, list[float | None]()
    for index, row in enumerate(rows):
        model = way([*rows[:index], *rows[index + 1 :]])
        errors.append(model.error(row) if whole <= set(model.terms) else None)
    return errors


def _fit_sum(rows: Sequence[Row], allowed: Sequence[str]) -> StepTime:
    """The model without a floor."""
    columns = dict[str, list[float]]()
    for name, column in TERMS.items():
        tried = {**columns, name: [column(row) / row.seconds for row in rows]}
        if name in allowed and _told_apart(tried):
            columns = tried
    return StepTime(**_solve(columns), terms=tuple(columns))


def _fit_with_floor(rows: Sequence[Row], allowed: Sequence[str]) -> StepTime:
    """The best of the models with a floor; the one without where no floor can be told."""
    floors = _floors(rows) if "floor" in allowed else []
    models = filter(None, (_fit_floor(rows, allowed, highest) for highest in floors))
    return min(models, key=lambda model: _square_error(model, rows), default=None) or _fit_sum(rows, allowed)


def _fit_floor(rows: Sequence[Row], allowed: Sequence[str], highest: float) -> StepTime | None:
    """The model in which just the rows up to so many examples a device stand on the floor; None where none is."""
    low = [row.examples <= highest for row in rows]
    columns = {
        "floor": [1 / row.seconds if on_floor else 0.0 for row, on_floor in zip(rows, low, strict=True)],
        **{
            name: [0.0 if on_floor else TERMS[name](row) / row.seconds for row, on_floor in zip(rows, low, strict=True)]
            for name in ("fixed", "example")
            if name in allowed
        },
    }
    if not _told_apart(columns):
        return None
    for name in ("byte", "latency"):
        tried = {**columns, name: [TERMS[name](row) / row.seconds for row in rows]}
        if name in allowed and _told_apart(tried):
            columns = tried
    if len(columns) >= len(rows):
        return None
    model = StepTime(**_solve(columns), terms=tuple(columns))
    climbs = [model.fixed + model.example * row.examples >= model.floor for row in rows]
    return model if climbs == [not on_floor for on_floor in low] else None


def _floors(rows: Sequence[Row]) -> list[float]:
    """The numbers of examples a device at which a floor may end: two others are on it or at its end, and two above."""
    examples = sorted({row.examples for row in rows})
    return [below for below, _ in pairwise(examples)][1:-1]


def _told_apart(columns: dict[str, list[float]]) -> bool:
    """Whether the rows determine a parameter for each column."""
    matrix = np.array(list(columns.values())).T
    lengths = np.linalg.norm(matrix, axis=0)
    if len(matrix) < len(lengths) or not np.all(lengths > 0):
        return False
    return float(np.linalg.svd(matrix / lengths, compute_uv=False)[-1]) > LEAST_SINGULAR_VALUE


def _solve(columns: dict[str, list[float]]) -> dict[str, float]:
    """The parameters with which the columns, of shares of the measured seconds, add up to 1 as nearly as can be."""
    matrix = np.array(list(columns.values())).T
    lengths = np.linalg.norm(matrix, axis=0)
    found, _ = nnls(matrix / lengths, np.ones(len(matrix)))
    return dict(zip(columns, (found / lengths).tolist(), strict=True))


def _square_error(model: StepTime, rows: Sequence[Row]) -> float:
    return sum(model.error(row) ** 2 for row in rows)
