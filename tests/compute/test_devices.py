"""Devices are found or refused, and torch has their dtypes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import streammerge
from streammerge.compute.devices import available_devices, check_float64, find_device
from streammerge.compute.lanes import torch_dtype
from streammerge.errors import DeviceError
from streammerge.tensors import DTYPES

CPU = torch.device("cpu")


# ── finding devices ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the machine has so many devices of each kind."""

    def pretend(**counts: int) -> None:
        for kind in ("xpu", "mps", "cuda"):
            count = counts.get(kind, 0)
            monkeypatch.setattr(
                torch,
                kind,
                SimpleNamespace(is_available=lambda count=count: count > 0, device_count=lambda count=count: count),
            )

    return pretend


def test_a_machine_with_nothing_but_a_cpu(machine):
    machine()
    assert available_devices() == ["cpu"]
    assert find_device("auto") == find_device("cpu") == CPU


def test_auto_is_the_accelerator(machine):
    machine(cuda=2)
    assert available_devices() == ["cpu", "cuda:0", "cuda:1", "cuda"]
    assert find_device("auto") == find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cpu") == CPU
    machine(mps=1)
    assert available_devices() == ["cpu", "mps"]
    assert find_device("auto") == torch.device("mps")


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps", "xpu", "gpu", "", "cpu:7", "CUDA:0", "cuda:", "cuda:0:0"])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(machine, name):
    cards = 2 if name.startswith(("cuda:", "CUDA")) else 0
    machine(cuda=cards)
    there = "cpu, cuda:0, cuda:1, cuda" if cards else "cpu"
    with pytest.raises(DeviceError, match=rf"no device '{name}' on this machine\n  there is: {there}\n"):
        find_device(name)


def test_a_merge_on_a_device_that_is_not_there_writes_nothing(families, tmp_path):
    _, paths = families["F16"]
    with pytest.raises(DeviceError, match=r"no device 'cuda:99'.*\n.*\n.*Nothing was written\."):
        streammerge.merge(streammerge.linear(paths[0]), output=tmp_path / "out.safetensors", device="cuda:99")
    assert not list(tmp_path.iterdir())


def test_a_device_without_float64_is_refused_what_needs_it(families, tmp_path):
    _, paths = families["F16"]

    def jobs(merge, **options):
        return streammerge.make_plan(merge, output=tmp_path / "out.safetensors", **options).jobs

    linear, slerp = streammerge.linear(*paths[:2], dtype="fp32"), streammerge.slerp(*paths[:2], t=0.5)
    mps = torch.device("mps")
    check_float64(CPU, jobs(linear))
    check_float64(mps, jobs(streammerge.linear(*paths[:2])))
    check_float64(mps, jobs(linear, compute_dtype="fp32"))
    for given in (jobs(linear), jobs(slerp), jobs(slerp, compute_dtype="fp32")):
        with pytest.raises(DeviceError, match=r"mps has no float64, which 9 tensors need"):
            check_float64(mps, given)


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.torch_name])
def test_torch_has_the_dtype_and_it_is_as_large_as_it_should_be(name):
    dtype = DTYPES[name]
    if hasattr(torch, dtype.torch_name):
        assert torch_dtype(dtype).itemsize * 8 == dtype.bits
        assert torch_dtype(dtype).is_floating_point == (dtype.mergeable or name == "F8_E8M0")


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if not dtype.torch_name])
def test_what_torch_cannot_hold_is_an_error(name):
    with pytest.raises(DeviceError, match=rf"this torch \(.*\) has no {name} elements\n  Install a newer torch"):
        torch_dtype(DTYPES[name])
