"""What a merge takes of main memory and of cards: the buffers of how many workers, and whole tensors that are held."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from streammerge.compute.card_costs import OnCard
from streammerge.compute.machine import (
    BARE_BYTES,
    CARD_BLOCKS,
    CARD_PINNED_BYTES,
    CARD_THREADS,
    DEFAULT_WORK_BYTES,
    MAPPED_BYTES,
    MAX_COMPILED_THREADS,
    MAX_THREADS,
    MIB,
    PROMISED_BYTES,
    USUAL_BLOCKS,
    VRAM_BYTES,
    Allotment,
    cards_of,
    free_bytes,
    share_out,
)
from streammerge.plan.jobs import Kind
from streammerge.recipe.options import Options

OVERHEAD_BYTES: Final = 16 * MIB
"""What the process takes above a bare `import torch` beside its lanes and what it keeps of headers."""

SURVEY_BYTES: Final = 1560
"""What measuring tensors with others takes for each of them, a result of its own included."""

FREE_SHARE: Final = 0.25
"""What whole tensors may take, beyond one at a time, of the machine's free memory if no limit is given."""


@dataclass(frozen=True)
class Memory:
    """What jobs of these kinds take.

    So many tensors are measured `together`, `described_bytes` are kept of headers and decisions, and files are read by
    mapping them if it `is_mapped`.
    """

    kinds: Sequence[Kind]
    together: int
    options: Options
    described_bytes: int
    needs_torch: bool
    is_mapped: bool

    @property
    def lane_bytes(self) -> int:
        """What a lane takes at the most beside what it maps."""
        return max((kind.lane_bytes for kind in self.kinds), default=0)

    @functools.cached_property
    def on_card(self) -> OnCard:
        """What a lane takes at the most that computes on a card."""
        return OnCard.most(kind.on_card for kind in self.kinds)

    @property
    def card_lane_bytes(self) -> int:
        """What it takes of the card at the least, with what a library takes that multiplies matrices; where there is no
        card, of main memory."""
        return self.on_card.least + self.on_card.library or self.lane_bytes

    @property
    def host_lane_bytes(self) -> int:
        """What a lane takes of main memory, beside what it maps and pins: little if its buffers lie on a card that has
        memory of its own."""
        return self.on_card.staged if self.options.device.startswith("cuda") else self.lane_bytes

    @property
    def held_bytes(self) -> int:
        """What has to be held beside the lanes' buffers, for the tensor that takes the most of it."""
        return self.held_together(1)

    def held_together(self, tensors: int) -> int:
        """The same for as many tensors, those that take the most of it."""
        kinds = sorted(self.kinds, key=lambda kind: kind.held_bytes, reverse=True)
        each = (kind.held_bytes for kind in kinds for _ in range(min(kind.count, tensors)))
        return sum(itertools.islice(each, tensors)) + SURVEY_BYTES * self.together

    @property
    def card_bytes(self) -> int:
        """What a card that can decompose holds beside them, for the tensor that takes the most of it."""
        return max((kind.card_bytes for kind in self.kinds), default=0)

    def allot(
        self,
        work_limit: int | None = None,
        vram_limit: int | None = None,
        *,
        card_bytes: int = 0,
        cards: int | None = None,
    ) -> Allotment:
        """Share `work_limit` bytes out to lanes, as many as fit, and the cards' memory, and the machine has cores for.

        Whole tensors are held beside the lanes' buffers: one at the least, and one for every lane where there is room;
        on the card if it is to hold so many bytes of them, which have to fit its limit. The limit is each card's; all
        that is held has room on one, because nothing says on which it will be.
        """
        cards = cards_of(self.options.device) if cards is None else cards
        vram = vram_limit or self.options.max_vram
        usual = cards * min(DEFAULT_WORK_BYTES, max(PROMISED_BYTES - self.fixed_bytes - self.described_bytes, MIB))
        lanes_limit = usual if work_limit is None else work_limit - self.held_bytes
        shared = share_out(
            self.host_lane_bytes,
            self.options.threads,
            lanes_limit,
            device_bytes=self.card_lane_bytes,
            device_limit=None if vram is None else vram - card_bytes,
            most_threads=self._most_threads * cards,
            mapped=self.mapped_bytes,
            devices=cards,
        )
        each = -(-shared.threads // cards)
        held = self._held_beside(shared, each, work_limit, vram if card_bytes else None)
        if card_bytes and vram is not None:
            vram -= held  # the rest is for the lanes
        left = None if work_limit is None else work_limit - shared.work_bytes - held
        blocks = self._card_blocks(each, vram, left, cards=min(cards, shared.threads))
        work = shared.work_bytes + held + shared.threads * blocks * self.on_card.pinned
        return replace(shared, held_bytes=held, work_bytes=work, blocks=blocks, cards=min(cards, shared.threads))

    def _held_beside(self, shared: Allotment, lanes: int, work_limit: int | None, vram: int | None) -> int:
        """What is held beside so many lanes of each card, where they leave room in main memory and in a card's."""
        if not self.held_bytes:
            return 0
        room = self._room_beside(shared.work_bytes) if work_limit is None else work_limit - shared.work_bytes
        if vram is not None:
            room = min(room, vram - max(VRAM_BYTES, lanes * self.card_lane_bytes))
        return max(self.held_bytes, min(room, self.held_together(shared.threads)))

    @property
    def _most_threads(self) -> int:
        """How many workers there are at the most, unless the user asks for more."""
        if self.options.device != "cpu":
            return CARD_THREADS
        return MAX_THREADS if self.needs_torch else MAX_COMPILED_THREADS

    def _card_blocks(self, lanes: int, vram: int | None, left: int | None, *, cards: int) -> int:
        """How many blocks the lanes of each card take at once, in its memory and in what is `left` of main memory."""
        taken = self.on_card
        if not taken.pinned:
            return 1
        most = CARD_BLOCKS.get(self.options.device.partition(":")[0], USUAL_BLOCKS)
        room = ((vram or VRAM_BYTES) // lanes - taken.library) // max(taken.ranges, 1)
        pinned = (CARD_PINNED_BYTES * cards if left is None else left) // (lanes * cards * taken.pinned)
        return max(1, min(most, room, 1 << max(pinned, 1).bit_length() - 1))  # torch pins powers of two

    def _room_beside(self, lanes_bytes: int) -> int:
        """What may be held beside the lanes where there is no limit: so much as keeps the promise, if one tensor does;
        a worker would wait for the others while a tensor that they hold is read, or its last blocks are made."""
        room = PROMISED_BYTES - self.fixed_bytes - self.described_bytes - lanes_bytes
        return room if room >= self.held_bytes else int(FREE_SHARE * free_bytes())

    @property
    def mapped_bytes(self) -> tuple[int, int]:
        """The most and the least that a worker keeps mapped; none is counted for what reads into its own buffers."""
        return MAPPED_BYTES if self.needs_torch or self.is_mapped else (0, 0)

    @property
    def fixed_bytes(self) -> int:
        """What of that is the process's own, whatever the plan."""
        return OVERHEAD_BYTES if self.needs_torch else BARE_BYTES
