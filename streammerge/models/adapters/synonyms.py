"""Names of modules that name the same as others, which are the usual ones.

    model.language_model.layers.0.mlp       model.layers.0.mlp, language_model.model.layers.0.mlp, layers.0.mlp
    encoder.layers.0.mlp.fc1                CLIP's text_model.encoder.layers.0.mlp.fc1, as transformers 5 has it
double_blocks.0.processor.qkv_lora1     img_attn.qkv of the block, and txt_attn.qkv with a 2
double_blocks.0.processor.proj_lora1    img_attn.proj, and txt_attn.proj
double_blocks.0.img_attn_q              the first rows of img_attn.qkv, where these are one tensor
single_blocks.0.processor.proj          linear2
single_blocks.0.processor.qkv           queries, keys and values, which are some rows of linear1
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

XLABS: Final = re.compile(
    r"(?P<block>double|single)_blocks\.(?P<number>\d+)\.processor\.(?P<part>qkv|proj)(?:_lora(?P<stream>[12]))?"
)
"""A module's path; the `_lora` of single blocks belongs to their tensors' names."""


def xlabs_paths(path: str) -> tuple[str, ...]:
    """What the original calls a module of XLabs', or diffusers the several that it is; nothing if it is none."""
    match = XLABS.fullmatch(path)
    if match is None:
        return ()
    block, number, part, stream = match.groups()
    if block == "double":
        return (f"double_blocks.{number}.{'txt' if stream == '2' else 'img'}_attn.{part}",)
    if part == "proj":
        return (f"single_blocks.{number}.linear2",)
    return tuple(f"single_transformer_blocks.{number}.attn.to_{each}" for each in "qkv")


_APART: Final = re.compile(r"double_blocks[._](\d+)[._](img|txt)_attn[._]([qkv])")


def paths_apart(path: str) -> tuple[str, ...]:
    """What diffusers calls queries, keys or values that HunyuanVideo 1.5 has apart, and ComfyUI's file of it as rows of
    one tensor; nothing if it is none."""
    match = _APART.fullmatch(path)
    if match is None:
        return ()
    number, stream, part = match.groups()
    return (f"transformer_blocks.{number}.attn.{f'to_{part}' if stream == 'img' else f'add_{part}_proj'}",)


_OF_CLIP: Final = re.compile(r"(?:encoder([._])layers|embeddings([._])\w+_embedding|final_layer_norm)(?:[._]|$)")


def with_text_model(path: str) -> str:
    """The name of a module of CLIP as older versions of transformers have it; other names as they are."""
    match = _OF_CLIP.match(path)
    return f"text_model{match[1] or match[2] or '.'}{path}" if match else path


_OF_LANGUAGE: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


def language_paths(path: str) -> Iterator[str]:
    """Where else a module of a language model, or of what is around one, may stand: versions of transformers, and its
    classes with and without a head, put something else before it."""
    start = next(each for each in _OF_LANGUAGE if path.startswith(each))
    yield from (each + path.removeprefix(start) for each in _OF_LANGUAGE if each != start)


def usual_path(path: str) -> str:
    """A module's path as the original calls it, where XLabs has another name for it; else itself."""
    paths = xlabs_paths(path)
    return paths[0] if len(paths) == 1 else path
