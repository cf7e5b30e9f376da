"""Where the tokens of a generated text exited."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Exits:
    """How many tokens exited where: `counts[0]` at the base, `counts[k]` at stage k; empty for other models."""

    counts: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        names = ["base", *(f"stage {number}" for number in range(1, len(self.counts)))]
        return ", ".join(f"{name} {count}" for name, count in zip(names, self.counts, strict=True))
