"""One model, many names: what a tensor of an original checkpoint is called in diffusers, and what of which it is there.

    found = recognise(model.tensors)      # None: nothing that is known
    found.named("diffusers")              # {"unet.conv_in.weight": Source(…, (Piece("model.diffusion_model.…", …),))}
    found.component("denoiser").seen("theirs")    # the UNet alone, in diffusers' names, without prefixes

A kind of component (a UNet, a VAE, CLIP) has two namings, `ours` (the original one) and `theirs` (diffusers', which of
text encoders is transformers'); `rules` is the language in which they are told, `pieces` what follows for the tensors,
`places` what stands before the names in which file, `recognition` finds out all of that for a model by its header.
"""

from streammerge.models.dialects.counterparts import Reading as Reading
from streammerge.models.dialects.counterparts import read_as as read_as
from streammerge.models.dialects.pieces import Piece as Piece
from streammerge.models.dialects.pieces import Source as Source
from streammerge.models.dialects.places import Role as Role
from streammerge.models.dialects.recognition import Component as Component
from streammerge.models.dialects.recognition import Naming as Naming
from streammerge.models.dialects.recognition import Recognised as Recognised
from streammerge.models.dialects.recognition import recognise as recognise
