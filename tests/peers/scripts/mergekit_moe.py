"""Builds mixtures as mergekit-moe does: RECIPE.yaml to the folder RECIPE.mergekit, for every file that is named."""

import sys
from pathlib import Path

import yaml
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build

for word in sys.argv[1:]:
    path = Path(word)
    config = MoEMergeConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    output = path.with_suffix(".mergekit")
    output.mkdir()
    build(config, str(output), MergeOptions(copy_tokenizer=False, quiet=True))
