"""How long a merge takes on the CPU and on a card: by its bytes and operations, and by rates measured once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from streammerge.compute.machine import usable_cores
from streammerge.compute.rates import Known, Rates, known_rates

if TYPE_CHECKING:
    from streammerge.plan.jobs import Kind
    from streammerge.plan.plan import Plan
    from streammerge.recipe.options import Options

COMPILED: Final = 0.25
"""What an operation takes in compiled loops, of what it takes torch: most of that is going through memory."""

WORTH: Final = 0.8
"""Of the seconds that it took, so many or less elsewhere are worth a line."""


@dataclass(frozen=True, slots=True)
class Estimates:
    """Seconds on the CPU and on the card, and how the card is called; when it was measured."""

    cpu: float
    card: float
    name: str
    date: str

    @property
    def faster(self) -> str:
        """`cpu` or `cuda`: the CPU where it makes no difference."""
        return "cuda" if self.card < self.cpu else "cpu"

    def of(self, device: str) -> float:
        """The seconds on this device."""
        return self.cpu if device == "cpu" else self.card

    def told(self) -> str:
        """In words."""
        return (
            f"about {seconds(self.cpu)} on the CPU, about {seconds(self.card)} on {self.name} "
            f"(--device cuda), by rates of {self.date}"
        )


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A device on which the merge would have taken less, how many seconds about, and how many it took here."""

    device: str
    seconds: float
    took: float

    def told(self) -> str:
        """In words."""
        times = self.took / self.seconds
        return f"--device {self.device} would take about {seconds(self.seconds)}: {times:.1f} times as fast"


def seconds(number: float) -> str:
    """`0.4 s`, `12 s`"""
    return f"{number:.1f} s" if number < 10 else f"{number:,.0f} s"


def estimates_of(plan: Plan, known: Known | None = None) -> Estimates | None:
    """What is expected of both devices; None where there is no card, or nothing is known of it."""
    if plan.options.device != "cpu" and not plan.options.device.startswith("cuda"):
        return None
    known = known or known_rates()
    if known is None:
        return None
    moved = plan.bytes_to_read + plan.output.nbytes
    kinds = plan.jobs.kinds
    threads = plan.options.threads or usable_cores()
    return Estimates(
        _on_cpu(kinds, moved, known.cpu, threads), _on_card(kinds, moved, known.card), known.name, known.date
    )


def _on_cpu(kinds: Sequence[Kind], moved: int, rates: Rates, threads: int) -> float:
    """Everything one after the other, by all workers at once; more workers than cores are no faster."""
    share = min(threads, usable_cores()) / usable_cores()
    operations = sum(kind.count * kind.operations * (COMPILED if kind.has_loops else 1.0) for kind in kinds)
    decompositions = sum(kind.count * kind.decomposed for kind in kinds)
    computed = operations / rates.computing + decompositions / (rates.decomposing * usable_cores())
    return rates.starting + (moved / rates.moving + computed) / share


def _on_card(kinds: Sequence[Kind], moved: int, rates: Rates) -> float:
    """Computing beside moving."""
    operations = sum(kind.count * kind.operations for kind in kinds)
    decompositions = sum(kind.count * kind.decomposed for kind in kinds)
    computed = operations / rates.computing + decompositions / rates.decomposing
    return rates.starting + max(moved / rates.moving, computed)


def elsewhere(plan: Plan, device: str, took: float) -> Elsewhere | None:
    """Where the merge would have been faster than here, if that is worth to be told.

    What it took more than was expected is counted there too: a slow disk is slow for every device.
    """
    found = estimates_of(plan) if device == "cpu" or device.startswith("cuda") else None
    if found is None or took <= 0:
        return None
    here, other = ("cpu", "cuda") if device == "cpu" else ("cuda", "cpu")
    own, there = found.of(here), found.of(other)
    expected = there + took - own if took >= own else there * took / own
    return Elsewhere(other, expected, took) if expected <= WORTH * took else None


def plan_where_faster(options: Options, plan: Callable[[Options], Plan]) -> Plan:
    """The merge planned for the device that takes less; for the first accelerator there is where nothing tells.

    The plan names the device, so that a merge is resumed on the one on which it was begun.
    """
    from streammerge.compute.probing import rates_here  # late: it asks torch for a card

    known = rates_here()
    if known is None:
        return plan(options)
    on_cpu = plan(replace(options, device="cpu"))
    found = estimates_of(on_cpu, known)
    return on_cpu if found is None or found.faster == "cpu" else plan(replace(options, device="cuda"))
