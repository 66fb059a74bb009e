"""Every campaign. One more is a module of its own and a line here."""

from __future__ import annotations

from typing import Final

from tests.stress import headers, texts, zips
from tests.stress.campaign import Campaign

CAMPAIGNS: Final[tuple[Campaign, ...]] = (headers.CAMPAIGN, zips.CAMPAIGN, texts.CAMPAIGN)
