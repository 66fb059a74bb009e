"""Runs recipes of mergekit: RECIPE.yaml to the folder RECIPE.mergekit, for every file that is named."""

import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

for word in sys.argv[1:]:
    path = Path(word)
    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    run_merge(config, str(path.with_suffix(".mergekit")), MergeOptions(copy_tokenizer=False, quiet=True))
