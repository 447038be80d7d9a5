"""When to propose: from a warm-up on, every so many steps, until a freeze."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timetable:
    """Steps `warmup`, `warmup + period`, ... before `freeze`.

    Attributes:
        warmup: the first step, >= 0.
        period: from one to the next, >= 1.
        freeze: the first step that is too late; None: there is none.
    """

    warmup: int
    period: int
    freeze: int | None

    def has(self, step: int) -> bool:
        """Whether a step is on it."""
        late = self.freeze is not None and step >= self.freeze
        return not late and step >= self.warmup and not (step - self.warmup) % self.period

    def after(self, step: int) -> int | None:
        """The next step on it, after this one; None if there is none."""
        passed = max(0, step - self.warmup + self.period) // self.period
        following = self.warmup + passed * self.period
        return None if self.freeze is not None and following >= self.freeze else following

    def why_not(self, step: int) -> str:
        """Why a step is not on it, in words."""
        following = self.after(step)
        if following is None:
            late = self.freeze is not None and step >= self.freeze
            when = "frozen since" if late else "no proposal is due before the freeze at"
            return f"{when} step {self.freeze}"
        if step < self.warmup:
            return f"warming up until step {self.warmup}"
        return f"the next proposal is due at step {following}"
