"""What a pickle written by `torch.save` says of its tensors, found without running it.

The few calls by which torch describes tensors are answered with descriptions; every other class, function or object
is an inert placeholder (see `pickle_machine`).

Format: the calls as in `torch/_utils.py` and `torch/_tensor.py`, persistent ids as in `torch/serialization.py`, of
torch 1.6 and later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.machine import (
    Arguments,
    Bounds,
    Inert,
    Machine,
    MalformedPickleError,
    PickledDict,
    PickledObject,
    kind,
)
from streammerge.formats.torchzip.steps import run
from streammerge.tensors import DTYPES, DType

MAX_DIMENSIONS: Final = 64
"""The most dimensions that a tensor may have; torch allows as many."""


@dataclass(frozen=True, slots=True, eq=False)
class PickledStorage:
    """A run of elements, in the zip's member `data/<key>`; `dtype` is None if streammerge has no such type."""

    type_name: str
    dtype: DType | None
    key: str
    elements: int


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """A tensor's description as it was pickled, checked against no file: strides over a storage.

    `storage_elements` counts elements of `storage_dtype`; `storage_offset` and `stride` count elements of `dtype`.
    `state` is what a parameter or a subclass has beside its elements, in which there may be tensors, too.
    """

    dtype: DType
    storage_key: str
    storage_dtype: DType
    storage_elements: int
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    state: object = None


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable(Inert):
    """What stands for a tensor that isn't strides over plain elements; `name` says what it is instead."""


def describe_pickle(data: bytes, where: str, bounds: Bounds | None = None) -> object:
    """Describe what a pickle holds, without running it; `where` names the pickle in errors.

    The answer is a PickledTensor, PickledStorage, PickledDict, Unreadable, Inert, tuple, str, int, bool or None, and so
    are the values in its dicts and tuples. A pickle of anything else, or out of bounds, is a CheckpointError.
    """
    machine = Machine(data, call=_answer, persist=_storage, bounds=bounds or Bounds())
    try:
        return run(machine)
    except MalformedPickleError as problem:
        raise CheckpointError(
            f"{where}: this pickle does not describe tensors as torch.save does",
            found=[f"at byte {machine.file.tell()} of {len(data)}: {problem}"],
            advice=(
                "Nothing in it was executed. It is damaged, made to do harm, or holds far more than tensors: "
                "fetch it again from a source you trust, or save the state dict alone."
            ),
        ) from None


_STORAGE_DTYPES: Final[Mapping[str, DType]] = {
    "torch.BoolStorage": DTYPES["BOOL"],
    "torch.ByteStorage": DTYPES["U8"],
    "torch.CharStorage": DTYPES["I8"],
    "torch.ShortStorage": DTYPES["I16"],
    "torch.IntStorage": DTYPES["I32"],
    "torch.LongStorage": DTYPES["I64"],
    "torch.HalfStorage": DTYPES["F16"],
    "torch.BFloat16Storage": DTYPES["BF16"],
    "torch.FloatStorage": DTYPES["F32"],
    "torch.DoubleStorage": DTYPES["F64"],
    "torch.ComplexFloatStorage": DTYPES["C64"],
    # Untyped ones count bytes.
    "torch.UntypedStorage": DTYPES["U8"],
    "torch.storage.UntypedStorage": DTYPES["U8"],
    "torch._UntypedStorage": DTYPES["U8"],
    "torch.storage._UntypedStorage": DTYPES["U8"],
}
_TORCH_DTYPES: Final = {f"torch.{dtype.torch_name}": dtype for dtype in DTYPES.values() if dtype.torch_name}


def dtype_of(name: str) -> DType | None:
    """The dtype that torch calls so, `torch.float32`; None if streammerge has no such type."""
    return _TORCH_DTYPES.get(name)


def _storage(persistent_id: object) -> PickledStorage:
    if isinstance(persistent_id, tuple) and len(persistent_id) >= 5 and persistent_id[0] == "storage":
        _, class_, key, _, elements = persistent_id[:5]
        if isinstance(class_, Inert) and isinstance(key, str) and type(elements) is int and elements >= 0:
            return PickledStorage(class_.name, _STORAGE_DTYPES.get(class_.name), key, elements)
    raise MalformedPickleError("a persistent id other than ('storage', type, key, location, elements)")


def _answer(function: Inert, arguments: Arguments) -> object:
    """What stands for the result of calling this."""
    if call := _CALLS.get(function.name):
        return call(arguments)
    if _makes_tensor(function.name):
        return Unreadable(function.name)
    return PickledObject(function.name, [function, *arguments] if isinstance(function, PickledObject) else [*arguments])


def _makes_tensor(name: str) -> bool:
    """Whether this makes a tensor of a kind that isn't described here: sparse, quantized, wrapped, or NumPy's."""
    module, _, last = name.rpartition(".")
    package = module.partition(".")[0]
    return (
        last.endswith(("Tensor", "Parameter"))
        or (package == "torch" and last.startswith("_rebuild"))
        or (package == "numpy" and last == "_reconstruct")
    )


def _tensor(arguments: Arguments) -> object:
    """`_rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks, metadata)`; the first had four."""
    storage, offset, shape, stride = _at_least(4, arguments)[:4]
    if not isinstance(storage, PickledStorage) or storage.dtype is None:
        return _without_storage(storage)
    return _flagged(arguments[6:7]) or _strided(storage, storage.dtype, offset, shape, stride)


def _tensor_of_dtype(arguments: Arguments) -> object:
    """`_rebuild_tensor_v3(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata)`."""
    storage, offset, shape, stride, _, _, dtype_name = _at_least(7, arguments)[:7]
    if not isinstance(storage, PickledStorage) or storage.dtype is None:
        return _without_storage(storage)
    dtype = dtype_of(kind(dtype_name))
    if dtype is None:
        return Unreadable(f"a tensor of {kind(dtype_name)}")
    return _flagged(arguments[7:8]) or _strided(storage, dtype, offset, shape, stride)


def _without_storage(storage: object) -> Unreadable:
    """A tensor whose elements are of a type that streammerge doesn't have, or not in the file."""
    return Unreadable(f"a tensor over {storage.type_name if isinstance(storage, PickledStorage) else kind(storage)}")


def _flagged(metadata: Arguments) -> Unreadable | None:
    """A tensor whose elements aren't what its bytes say: torch flags conjugate and negative views."""
    flags = metadata[0] if metadata and isinstance(metadata[0], PickledDict) else {}
    flagged = [flag if isinstance(flag, str) else flag.name for flag, value in flags.items() if value is not False]
    return Unreadable(f"a view flagged {', '.join(flagged)}") if flagged else None


def _strided(storage: PickledStorage, dtype: DType, offset: object, shape: object, stride: object) -> PickledTensor:
    sizes, steps = _naturals(shape), _naturals(stride)
    if len(sizes) != len(steps) or len(sizes) > MAX_DIMENSIONS:
        raise MalformedPickleError(f"a tensor with {len(sizes)} dimensions and {len(steps)} strides")
    (start,) = _naturals((offset,))
    return PickledTensor(dtype, storage.key, storage.dtype or dtype, storage.elements, start, sizes, steps)


def _naturals(values: object) -> tuple[int, ...]:
    """These values, if they can be sizes or strides."""
    if not isinstance(values, tuple):
        raise MalformedPickleError(f"a tensor whose shape or stride is {kind(values)}")
    for value in values:
        if type(value) is not int or value < 0:
            raise MalformedPickleError("a tensor whose offset, sizes or strides aren't numbers from 0 up")
    return values


def _parameter(arguments: Arguments) -> object:
    """`_rebuild_parameter(tensor, requires_grad, hooks, state)`: the tensor, with the state if there is one."""
    (tensor,) = _at_least(1, arguments)[:1]
    if isinstance(tensor, PickledTensor):
        return replace(tensor, state=arguments[3:4]) if len(arguments) > 3 else tensor
    return tensor if isinstance(tensor, Unreadable) else Unreadable(f"a parameter of {kind(tensor)}")


def _subclass(arguments: Arguments) -> object:
    """`_rebuild_from_type_v2(function, class, arguments, state)`: what the function makes of its arguments."""
    function, class_, inner = _at_least(3, arguments)[:3]
    call = _TENSOR_CALLS.get(kind(function))
    made = call(inner) if call and isinstance(inner, tuple) else Unreadable(f"{kind(class_)}, by {kind(function)}")
    return replace(made, state=(made.state, *arguments[3:4])) if isinstance(made, PickledTensor) else made


def _dict(arguments: Arguments) -> object:
    """`OrderedDict()` or `defaultdict(factory)`; what other arguments come to is not found out."""
    if not any(isinstance(argument, PickledObject | tuple | PickledDict) for argument in arguments):
        return PickledDict()
    return PickledObject("a dict made of lists", [*arguments])


def _size(arguments: Arguments) -> object:
    """`Size(shape)`: the shape."""
    return _naturals(arguments[0]) if arguments else ()


def _at_least(count: int, arguments: Arguments) -> Arguments:
    if len(arguments) < count:
        raise MalformedPickleError(f"a tensor of {len(arguments)} arguments, expected {count} or more")
    return arguments


Call = Callable[[Arguments], object]

_TENSOR_CALLS: Final[Mapping[str, Call]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: Final[Mapping[str, Call]] = {
    **_TENSOR_CALLS,
    "torch._tensor._rebuild_from_type": _subclass,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
}
