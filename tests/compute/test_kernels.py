"""Compiled loops against torch: the same bytes, findings and products for any expression, dtype, length and value."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute.examine import quieted
from streammerge.compute.expressions import BLOCK, ByGram, Combined, Node, Rounded, Stored, Term, stored_leaves
from streammerge.compute.kernels import library
from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.library import CHUNK, KINDS, kernels
from streammerge.compute.kernels.maker import SPACE, KernelMaker, is_compiled
from streammerge.compute.kernels.program import compiled
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.makers import Maker, Wanted
from streammerge.compute.reading import carry_out
from streammerge.compute.rounding import rounded
from streammerge.compute.survey import Survey
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.files import ByteFile
from streammerge.formats.readers import MappedReader, PositionalReader
from streammerge.methods import find_method
from streammerge.methods.registry import GramMethod
from streammerge.methods.statistics.gram import Tensors
from streammerge.methods.statistics.passes import Vectors
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import normal, raw_bytes, save_model

needs_kernels = pytest.mark.skipif(kernels() is None, reason="compiled loops were not built")
pytestmark = needs_kernels

HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def edges(dtype: torch.dtype) -> torch.Tensor:
    """All numbers of a small dtype, in float64, and what lies in the middle between two, and just beside it."""
    every = (HALVES if dtype.itemsize == 2 else BYTES).view(dtype).double()
    finite = every[torch.isfinite(every)].sort()[0]
    middle = (finite[1:] + finite[:-1]) / 2
    return torch.cat([every, middle, middle * (1 + 2.0**-40), middle * (1 - 2.0**-40)])


def all_values(kind: str) -> torch.Tensor:
    """Every value of the small dtypes; of the large ones values of every size, and all that are near a tie."""
    dtype = torch_dtype(DTYPES[kind])
    if dtype.itemsize < 4:
        return (HALVES if dtype.itemsize == 2 else BYTES).view(dtype)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31 - 1, (300_001,), generator=generator, dtype=torch.int64).to(torch.int32)
    small = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return torch.cat([bits.view(torch.float32).double(), *map(edges, small)]).to(dtype)


def store(folder: Path, name: str, tensor: torch.Tensor, shift: int = 0) -> Stored:
    """The tensor in a file of its own, behind so many other bytes."""
    path = folder / name
    path.write_bytes(b"\0" * shift + raw_bytes(tensor))
    kind = next(kind for kind in KINDS if torch_dtype(DTYPES[kind]) == tensor.dtype)
    return Stored(TensorInfo(DTYPES[kind], tuple(tensor.shape)), ByteFile(path), shift)


def made(maker: Maker, wanted: Wanted) -> tuple[bytes, list[Any]]:
    """All blocks of the tensor, and what was found in them."""
    with maker.running():
        survey = carry_out(Survey(wanted.node, wanted.compute), maker)
        blocks = maker.blocks(wanted, survey.known, suspicious=survey.suspicious)
        found, data, elements = [], b"", wanted.node.info.elements
        for start in range(0, elements, BLOCK):
            block = blocks.make(start, min(start + BLOCK, elements))
            data += bytes(block.data)
            found.append(block.finding and block.finding.to_json())
    return data, found


def assert_same(wanted: Wanted, *, mapped: bool = False) -> None:
    """Both ways come to the same bytes, and find the same in them."""
    assert is_compiled(wanted.node, wanted.stored, wanted.compute)
    by_torch = made(TensorMaker(Lane(PositionalReader())), wanted)
    by_loops = made(KernelMaker(MappedReader() if mapped else PositionalReader()), wanted)
    assert by_loops[0] == by_torch[0]
    assert by_loops[1] == by_torch[1]


@pytest.mark.parametrize("compute", ["F32", "F64"])
@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_converted_as_torch_does_it(tmp_path, kind, stored, compute):
    values = all_values(kind)
    node = store(tmp_path, "w", values)
    out = memoryview(bytearray(values.numel() * DTYPES[stored].bits // 8))
    library = kernels()
    assert library is not None
    program = compiled([node], DTYPES[compute], {})
    Kernels(library).store(program, [memoryview(bytearray(raw_bytes(values)))], values.numel(), stored, out)
    expected = rounded(rounded(values, torch_dtype(DTYPES[compute])), torch_dtype(DTYPES[stored]))
    quieted(expected)
    assert bytes(out) == raw_bytes(expected)


LENGTHS = st.sampled_from([0, 1, 7, 8, 9, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 5000])
NUMBERS = st.sampled_from([1.0, -1.0, 0.5, 0.1, 1 / 3, -2.7, 1e-3, 1e4, 1e-40, 3e38])
CLASSES = st.sampled_from(["normal", "subnormal", "large", "zeros", "not finite", "bits"])


def values_of(kind: str, which: str, elements: int, seed: int) -> torch.Tensor:
    """Values of this class."""
    dtype = torch_dtype(DTYPES[kind])
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(elements, generator=generator, dtype=torch.float64)
    if which == "bits":
        whole = torch.randint(0, 256, (elements * dtype.itemsize,), generator=generator, dtype=torch.int64)
        return whole.to(torch.uint8).view(dtype)
    if which == "zeros":
        plain = torch.where(plain > 0, 0.0, torch.where(plain > -1, -0.0, plain))
    if which == "not finite":
        plain = torch.where(plain > 2, math.inf, torch.where(plain < -2, -math.inf, plain))
        plain = torch.where((plain > 1.5) & (plain < 2), math.nan, plain)
    limit = float(torch.finfo(dtype).max)
    return (plain * {"subnormal": float(torch.finfo(dtype).tiny) / 4, "large": limit / 3}.get(which, 1.0)).to(dtype)


@st.composite
def trees(draw: st.DrawFn, leaves: list[Stored], depth: int = 2) -> Node:
    """Combinations and roundings over these leaves."""
    shape = leaves[0].info.shape
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(leaves))
    kind = draw(st.sampled_from(list(KINDS)))
    if draw(st.booleans()):
        terms = draw(st.lists(st.tuples(NUMBERS, trees(leaves, depth - 1)), max_size=4))
        divisor = draw(st.sampled_from([1.0, 3.0, 0.7]))
        return Combined(TensorInfo(DTYPES[kind], shape), tuple(Term(c, node) for c, node in terms), divisor)
    return Rounded(TensorInfo(DTYPES[kind], shape), draw(trees(leaves, depth - 1)))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_combination_comes_to_the_same_bytes_and_findings(tmp_path, data):
    elements, leaves = data.draw(LENGTHS), []
    for number in range(data.draw(st.integers(1, 3))):
        kind, which, seed = data.draw(st.sampled_from(list(KINDS))), data.draw(CLASSES), data.draw(st.integers(0, 99))
        shift = data.draw(st.sampled_from([0, 1, 2, 3]))
        leaves.append(store(tmp_path, f"{number}", values_of(kind, which, elements, seed), shift))
    node = data.draw(trees(leaves))
    stored = DTYPES[data.draw(st.sampled_from(list(KINDS)))]
    wanted = Wanted(node, DTYPES[data.draw(st.sampled_from(["F32", "F64"]))], stored)
    assert_same(wanted, mapped=data.draw(st.booleans()) and elements > 0)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_methods_of_products_come_to_the_same(tmp_path, data):
    method, count = data.draw(
        st.sampled_from([("slerp", 2), ("nuslerp", 2), ("multislerp", 3), ("model_stock", 4), ("karcher", 3)])
    )
    elements = data.draw(st.one_of(LENGTHS, st.just(BLOCK + 3)))
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=count, max_size=count))
    seeds = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    classes = [data.draw(CLASSES) if elements < BLOCK else "normal" for _ in kinds]
    leaves = tuple(
        store(tmp_path, f"{number}", values_of(kind, which, elements, seed))
        for number, (kind, which, seed) in enumerate(zip(kinds, classes, seeds, strict=True))
    )
    found = find_method(method)
    assert isinstance(found, GramMethod)
    parameters: dict[str, Any] = {parameter.name: parameter.default for parameter in found.parameters}
    parameters |= {"t": 0.3} if "t" in parameters else {}
    if "weight" in parameters:
        parameters["weight"] = tuple(0.5 + 0.1 * number for number in range(count - (found.base == "required")))
    node = ByGram(leaves[0].info, found, parameters, leaves, "w")
    compute = data.draw(st.sampled_from(["F32", "F64"]))
    wanted = Wanted(node, DTYPES[compute], leaves[0].info.dtype)
    try:
        made(TensorMaker(Lane(PositionalReader())), wanted)
    except streammerge.MergeError as error:
        with pytest.raises(streammerge.MergeError, match=str(error)[:30].replace("(", ".")):
            made(KernelMaker(PositionalReader()), wanted)
    else:
        assert_same(wanted)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "F8_E4M3", "mixed"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("vectors", Vectors)
@pytest.mark.parametrize("which", ["normal", "large", "not finite"])
def test_products_of_what_is_read_as_it_is_stored(tmp_path, kind, count, vectors, which):
    kinds = ["F16", "F32", "BF16", "F16", "F64"][:count] if kind == "mixed" else [kind] * count
    values = [
        values_of(kind, which if number == 1 else "normal", 3 * CHUNK + 5, number) for number, kind in enumerate(kinds)
    ]
    leaves = [store(tmp_path, f"{number}", tensor) for number, tensor in enumerate(values)]
    library = kernels()
    assert library is not None
    program = compiled(leaves, DTYPES["F32"], {})
    blocks = [memoryview(b"\0" + raw_bytes(tensor))[1:] for tensor in values]  # not aligned
    found = Kernels(library).products(program, blocks, 3 * CHUNK + 5, count, vectors, wide=False)
    expected = Tensors([tensor.float() for tensor in values]).products(vectors, wide=False)
    assert repr(found.rows) == repr(expected.rows)
    assert repr(list(found.greatest)) == repr(list(expected.greatest))


@pytest.mark.parametrize("coefficient", [1e39, -1e300, 3.4028235e38, 3.4028236e38, 1e-46, 5e-324])
def test_coefficients_beyond_the_range_are_infinite_or_nothing_in_both(tmp_path, coefficient):
    leaves = [store(tmp_path, f"{number}", normal((50,), number, torch.float16)) for number in (1, 2)]
    node = Combined(leaves[0].info, tuple(Term(coefficient, leaf) for leaf in leaves))
    assert_same(Wanted(node, DTYPES["F32"], DTYPES["F32"]))


def test_many_inputs_are_read_in_parts_that_lie_side_by_side(tmp_path):
    count = 2 * SPACE // (4 * BLOCK) + 3
    leaves = [store(tmp_path, f"{number}", normal((BLOCK + 5,), number)) for number in range(count)]
    node = Combined(leaves[0].info, tuple(Term(1.0 / (3 + number), leaf) for number, leaf in enumerate(leaves)))
    assert sum(leaf.info.dtype.bits // 8 for leaf in stored_leaves(node)) * BLOCK > SPACE
    assert_same(Wanted(node, DTYPES["F64"], DTYPES["F32"]))


LINEAR = {"merge_method": "linear", "parameters": {"weight": 0.3, "normalize": False}}


def models(folder: Path) -> list[Path]:
    return [save_model(folder / f"{n}.safetensors", {"w": normal((300, 129), n, torch.float16)}) for n in (1, 2)]


def output_of(folder: Path, name: str) -> bytes:
    recipe = {**LINEAR, "models": [str(path) for path in sorted(folder.glob("[12].safetensors"))]}
    streammerge.merge(recipe, output=folder / name, sync=False, metadata=False)
    return (folder / name).read_bytes()


@pytest.fixture
def unloaded(monkeypatch):
    """Looks for the library anew, in a folder of its own."""

    def look(folder: Path) -> None:
        monkeypatch.setattr(library, "__file__", str(folder / "library.py"))
        library._found.cache_clear()

    yield look
    library._found.cache_clear()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("off", "off"),
        ("missing", "not built"),
        ("broken", "can't be loaded"),
        ("older", "another version"),
        ("weak", "no AVX2"),
    ],
)
def test_without_the_library_the_bytes_are_the_same(tmp_path, monkeypatch, unloaded, fault, said):
    models(tmp_path)
    plain = output_of(tmp_path, "plain.safetensors")
    folder = tmp_path / "kernels"
    folder.mkdir()
    name = "_kernels.dll" if sys.platform == "win32" else "_kernels.so"
    if fault == "broken":
        (folder / name).write_bytes(b"\x7fELF no more")
    if fault in ("older", "weak"):
        shutil.copy(Path(library.__file__).with_name(name), folder / name)
        monkeypatch.setattr(library, "VERSION", 0) if fault == "older" else None
        monkeypatch.setattr(library, "is_able", lambda: False) if fault == "weak" else None
    if fault == "off":
        monkeypatch.setenv("STREAMMERGE_KERNELS", "off")
    else:
        unloaded(folder)
    assert kernels() is None
    assert said in library.kernels_in_use()
    assert output_of(tmp_path, "without.safetensors") == plain


def test_a_cpu_is_asked_what_it_can(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("flags : fpu avx2 f16c fma\n")
    assert library.is_able("x86_64", told)
    told.write_text("flags : fpu sse2\n")
    assert not library.is_able("x86_64", told)
    assert library.is_able("aarch64", told)


def test_addresses_of_read_only_memory_are_found():
    memory = bytearray(64)
    plain = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert library.address(memoryview(memory)) == plain
    assert library.address(memoryview(memory).toreadonly()[5:]) == plain + 5


WITHOUT_TORCH = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Refusing())
from streammerge.cli.main import run
run()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux")
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_torch_is_not_imported_and_all_stays_within_64_mb(tmp_path, method):
    for number in (1, 2):
        save_model(
            tmp_path / f"{number}.safetensors",
            {f"layers.{k}.w": normal((2048, 4096), 10 * number + k, torch.float16) for k in range(3)},
        )
    words = ["1.safetensors", "2.safetensors", "-m", method, "--no-sync", "--report", "r.json", "-o", "out.safetensors"]
    words += ["-p", "t=0.3"] if method == "slerp" else []
    environment = {**os.environ, "PYTHONPATH": str(Path(streammerge.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "compiled loops" in done.stdout
    report = (tmp_path / "r.json").read_text()
    peak = int(report.split('"peak_rss_bytes": ')[1].split(",")[0])
    assert peak <= 64_000_000
