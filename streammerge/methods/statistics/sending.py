"""What was measured, where it is to be used: sent to a card once for each worker, not again for every range."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FEW: Final = 2**20
"""More numbers than these are not kept on a card beside a worker's buffers: what is asked for is sent."""

ALL: Final = slice(None)


class Sent(threading.local):
    """Each worker's copies, which live as long as what they are copies of: workers don't wait for each other's."""

    def __init__(self) -> None:
        self.copies: dict[tuple[int, torch.device], Tensor] = {}


SENT: Final = Sent()


def sent(values: Tensor, device: torch.device, part: slice = ALL) -> Tensor:
    """This part of the values, by their first index, on this device."""
    if values.device.type == device.type:
        return values[part]
    if values.numel() > FEW:
        return values[part].to(device)
    copies, key = SENT.copies, (id(values), device)
    if key not in copies:
        copies[key] = values.to(device)
        weakref.finalize(values, copies.pop, key, None).atexit = False
    return copies[key][part]
