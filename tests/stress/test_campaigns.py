"""A hundredth of every campaign of `make stress`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.campaign import Campaign, Effort
from tests.stress.campaigns import CAMPAIGNS


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
def test_a_hundredth_of_the_campaign_fails_nowhere(campaign: Campaign, tmp_path: Path):
    figures = campaign.run(Effort(0.01, 1, tmp_path))
    assert figures
    assert [figure for figure in figures if figure.failures] == []
