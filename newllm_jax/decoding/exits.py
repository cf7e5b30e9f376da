"""Where the tokens of a generated text exited."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Exits:
    """How many tokens exited where, and what that cost.

    Attributes:
      counts: `counts[0]` at the base (or after the easy path), `counts[k]` at stage k; empty for other models.
      costs: of a token at each exit, in passes of the base; empty where not known.
      names: of the exits; empty: base, stage 1, ...
    """

    counts: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def mean_cost(self) -> float:
        """Of a token, in passes of the base; 0 without tokens."""
        spent = sum(count * cost for count, cost in zip(self.counts, self.costs, strict=True))
        return spent / max(sum(self.counts), 1)

    def __str__(self) -> str:
        names = self.names or ["base", *(f"stage {number}" for number in range(1, len(self.counts)))]
        told = ", ".join(f"{name} {count}" for name, count in zip(names, self.counts, strict=True))
        return f"{told}; a token cost {self.mean_cost:.2f} passes of the base" if self.costs else told
