"""Every campaign. One more is a module of its own and a line here."""

from __future__ import annotations

from typing import Final

from tests.stress import faults
from tests.stress.campaign import Campaign

CAMPAIGNS: Final[tuple[Campaign, ...]] = (faults.CAMPAIGN,)
