"""Tensors that say they lie on a card, where there is none: torch computes on the CPU with what they hold.

As on a card they can't be computed with beside the CPU's tensors, and whoever wants to know what is in one waits for
it, as does who copies from memory that is not pinned. A lane has a stream of its own, and may not take what another
one's is still working on. Their memory is counted, that of temporaries too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CPU: Final = torch.device("cpu")
aten: Final = torch.ops.aten

WAITING: Final = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"}
    | {"_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors"}
)
"""Operations for which the CPU has to know what lies on a card."""

CUDA: Final = 1
META: Final = 14
"""What torch numbers these kinds of device by."""


class Cards(Protocol):
    """What tensors ask of the cards on which they lie."""

    @property
    def late(self) -> Any:  # noqa: ANN401
        """The copies of the lane that this thread runs."""

    def name(self, device: Any = None) -> str:  # noqa: ANN401
        """`cuda:0` for all that means it."""

    def take(self, card: str, nbytes: int) -> None:
        """So much more of a card's memory is taken; torch's error where there is not so much."""

    def give_back(self, card: str, nbytes: int) -> None:
        """So much less of it is taken."""

    def look(self, name: str) -> None:
        """Somebody has to know what lies on a card, and so waits for it."""


class Room:
    """So many bytes of a card's memory, which are given back with their last user."""

    def __init__(self, cards: Cards, card: str, nbytes: int) -> None:
        self.cards, self.card, self.nbytes, self.stream = cards, card, 0, cards.late
        cards.take(card, nbytes)
        self.nbytes = nbytes

    def __del__(self) -> None:
        self.cards.give_back(self.card, self.nbytes)


class CardTensor(torch.Tensor):
    """A tensor on a card: `held` is what is in it."""

    held: torch.Tensor
    room: Room

    @staticmethod
    def of(held: torch.Tensor, room: Room) -> CardTensor:
        """What holds these values, in this room."""
        made: CardTensor = torch.Tensor._make_wrapper_subclass(
            CardTensor,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(room.card),
        )
        made.held, made.room = held, room
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        raise AssertionError(f"{func} was called where nobody knows of cards")


class OnCards(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this thread tensors can be made on cards, and computed with."""

    def __init__(self, cards: Cards) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cards = cards

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        named = {argument.name: given for argument, given in zip(func._schema.arguments, args, strict=False)}
        named |= kwargs or {}
        tensors = tensors_in(named)
        there = [one for one in tensors if isinstance(one, CardTensor)]
        device = None if named.get("device") is None else torch.device(named["device"])
        if not there and (device is None or device.type != "cuda"):
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name == "to":
            return self._to(named)
        if name == "_to_copy" and device and device.type != named["self"].device.type:
            return self._moved(named["self"], named.get("dtype"), device)
        if name == "copy_" and len(there) == 1:
            return self._copied(named["self"], named["src"], non_blocking=named.get("non_blocking", False))
        if there and any(one.dim() for one in tensors if not isinstance(one, CardTensor)):
            shapes = [(str(one.device), tuple(one.shape), one.dtype) for one in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
        if any(one.room.stream is not self.cards.late for one in there):
            raise RuntimeError(f"{func} takes what another lane's stream has made, and has not waited for it")
        if name in WAITING or (name.startswith("index") and has_mask(named.get("indices"))):
            self.cards.look(name)
        card = str(there[0].device) if there else self.cards.name(device)
        on_cpu = {"device": CPU} if device is not None else {}
        made = func(*tree_map(held, args), **{**tree_map(held, kwargs or {}), **on_cpu})
        if device is not None and device.type == "cpu":
            return made
        written = written_by(func, named)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        rooms = {one.held.untyped_storage().data_ptr(): one.room for one in there}
        return tree_map(lambda one: self._there(one, card, rooms) if isinstance(one, torch.Tensor) else one, made)

    def _there(self, values: torch.Tensor, card: str, rooms: Mapping[int, Room]) -> CardTensor:
        """The values on this card: where they are views, in the room of what they are views of."""
        memory = values.untyped_storage()
        room = rooms.get(memory.data_ptr()) if memory.nbytes() else None
        return CardTensor.of(values, room or Room(self.cards, card, memory.nbytes()))

    def _to(self, named: Mapping[str, Any]) -> torch.Tensor:
        """`Tensor.to`: itself, where nothing is to be changed."""
        values: torch.Tensor = named["self"]
        like = named.get("other", values)
        dtype, device = named.get("dtype") or like.dtype, torch.device(named.get("device") or like.device)
        if dtype == values.dtype and device.type == values.device.type and not named.get("copy"):
            return values
        copied: torch.Tensor = self.__torch_dispatch__(
            aten._to_copy.default, (), (values,), {"dtype": dtype, "device": device}
        )
        return copied

    def _moved(self, values: torch.Tensor, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
        """A copy on the other side, which is waited for."""
        if values.numel():
            self.cards.look("to")
        if isinstance(values, CardTensor):
            return values.held.to(dtype or values.dtype, copy=True)
        copied = values.to(dtype or values.dtype, copy=True)
        return self._there(copied, self.cards.name(device), {})

    def _copied(self, target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
        """`Tensor.copy_` between the CPU and a card."""
        if not source.numel():
            return target
        if non_blocking:
            self.cards.late.copy(held(target), held(source))
        else:
            self.cards.look("copy_")
            held(target).copy_(held(source))
        return target


def held(value: Any) -> Any:  # noqa: ANN401
    """What a card's tensor holds; anything else as it is."""
    return value.held if isinstance(value, CardTensor) else value


def tensors_in(named: Mapping[str, Any]) -> list[torch.Tensor]:
    """Those among arguments, in lists too."""
    each = [one for value in named.values() for one in (value if isinstance(value, list | tuple) else [value])]
    return [one for one in each if isinstance(one, torch.Tensor)]


def has_mask(indices: Any) -> bool:  # noqa: ANN401
    """Whether what is taken is told by truth values, which have to be counted."""
    return any(isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices or ())


def written_by(func: Any, named: Mapping[str, Any]) -> list[Any]:  # noqa: ANN401
    """The arguments that the operation has written to and returns."""
    if not any(found.alias_info is not None and found.alias_info.is_write for found in func._schema.returns):
        return []
    return [
        named[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


@contextlib.contextmanager
def cards_named() -> Iterator[None]:
    """As long as this lasts torch takes a card for a device."""
    let_torch_name_cards()
    find_operations()
    plain = torch.tensor

    def tensor(*args: Any, device: Any = None, **named: Any) -> torch.Tensor:  # noqa: ANN401
        made = plain(*args, **named)  # of Python's numbers a tensor is made on the CPU, where nobody is asked, and sent
        return made if device is None else made.to(device)

    with mock.patch.object(torch.cuda, "_lazy_init", return_value=None), mock.patch.object(torch, "tensor", tensor):
        yield


@functools.cache
def find_operations() -> Sequence[Any]:
    """All of torch's operations, as Python knows them: two threads that ask for one first, at once, crash."""
    names = [name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    parts = (name.partition(".") for name in names)
    return [getattr(getattr(aten, name, None), overload or "default", None) for name, _, overload in parts]


def let_torch_name_cards() -> None:
    """Have a torch without CUDA look at no device where a tensor says that it lies on a card.

    It does so itself in a build with CUDA that finds no card; other builds have to be taken for one: what it does for
    tensors without memory does for these too.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[CUDA] or guards[META]
    torch._C._ensureCUDADeviceGuardSet()
