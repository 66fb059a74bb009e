"""Every campaign. One more is a module of its own and a line here."""

from __future__ import annotations

from typing import Final

from tests.stress import faults, full_disk, headers, power, texts, zips
from tests.stress.campaign import Campaign
from tests.stress.kill import KILL

CAMPAIGNS: Final[tuple[Campaign, ...]] = (
    KILL,
    faults.CAMPAIGN,
    power.CAMPAIGN,
    full_disk.CAMPAIGN,
    headers.CAMPAIGN,
    zips.CAMPAIGN,
    texts.CAMPAIGN,
)
