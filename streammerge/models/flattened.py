"""Parameters that FSDP has flattened: all of a module in one tensor, cut into equal parts for the ranks.

Which of the module's tensors lie where in it is known to the program that trained it alone.
"""

from __future__ import annotations

import re
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.tensors import Model

_FLAT: Final = re.compile(r"(?:.*\.)?_?flat_param(?:_\d+)?")


def check_not_flattened(called: str, model: Model) -> None:
    """CheckpointError if a model has parameters that are no tensors of a model."""
    found = [name for name in model.tensors if "flat_param" in name and _FLAT.fullmatch(name)]
    if found:
        raise CheckpointError(
            f"{called}: its parameters are flattened, as FSDP holds them, and nobody can tell the tensors apart",
            found=found,
            advice="Save it with FSDP's FULL_STATE_DICT or SHARDED_STATE_DICT (fsdp_state_dict_type of accelerate) in "
            "the program that trained it.",
        )
