"""Every kind of adapter against its formula, written out in float64 over whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.make.models import Tensors
from tests.models.adapters.baking import BIAS, MODULE, WEIGHT, bake, numbers, parts

Formula = Callable[[torch.Tensor], torch.Tensor]
"""What a weight becomes, of itself."""

OUT, IN, RANK, K = 12, 10, 3, 3
FLAT, KERNEL = (OUT, IN), (OUT, IN, K, K)


def double(*shape: int, seed: int) -> torch.Tensor:
    return numbers(*shape, seed=seed).double()


def add(difference: torch.Tensor) -> Formula:
    return lambda weight: weight + difference.reshape(weight.shape)


def lora(shape: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...], alpha: float | None = None):
    tensors = {"lora_up__weight": numbers(*up, seed=1), "lora_down__weight": numbers(*down, seed=2)}
    made = tensors["lora_up__weight"].double().flatten(1) @ tensors["lora_down__weight"].double().flatten(1)
    scale = 1.0 if alpha is None else alpha / down[0]
    return shape, parts(**tensors, **({} if alpha is None else {"alpha": alpha})), add(scale * made)


def core(up: torch.Tensor, mid: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nmkl,on,mi->oikl", mid.double(), up.double(), down.double())


def lora_with_core():
    up, mid, down = numbers(OUT, RANK, 1, 1, seed=1), numbers(RANK, RANK, K, K, seed=2), numbers(RANK, IN, 1, 1, seed=3)
    made = core(up.flatten(1), mid, down.flatten(1))
    return KERNEL, parts(lora_up__weight=up, lora_mid__weight=mid, lora_down__weight=down, alpha=1.5), add(made / 2)


def loha(shape: tuple[int, ...], width: int):
    a, b, c, d = (
        numbers(*size, seed=n) for n, size in enumerate([(OUT, RANK), (RANK, width), (OUT, RANK), (RANK, width)])
    )
    made = (a.double() @ b.double()) * (c.double() @ d.double())
    return shape, parts(hada_w1_a=a, hada_w1_b=b, hada_w2_a=c, hada_w2_b=d, alpha=6.0), add(2 * made)


def loha_with_core():
    sides: list[torch.Tensor] = []
    tensors: Tensors = {}
    for n in (1, 2):
        t, a, b = numbers(RANK, RANK, K, K, seed=n), numbers(RANK, OUT, seed=n + 2), numbers(RANK, IN, seed=n + 4)
        sides.append(torch.einsum("rskl,ro,si->oikl", t.double(), a.double(), b.double()))
        tensors |= {f"hada_t{n}": t, f"hada_w{n}_a": a, f"hada_w{n}_b": b}
    return KERNEL, parts(**tensors, alpha=3.0), add(sides[0] * sides[1])


def lokr_whole():
    one, two = numbers(3, 5, seed=1), numbers(4, 2, seed=2)
    return FLAT, parts(lokr_w1=one, lokr_w2=two, alpha=7.0), add(torch.kron(one.double(), two.double()))


def lokr_factored():
    a, b, c, d = numbers(3, RANK, seed=1), numbers(RANK, 5, seed=2), numbers(4, RANK, seed=3), numbers(RANK, 2, seed=4)
    made = torch.kron(a.double() @ b.double(), c.double() @ d.double())
    return FLAT, parts(lokr_w1_a=a, lokr_w1_b=b, lokr_w2_a=c, lokr_w2_b=d, alpha=6.0), add(2 * made)


def lokr_convolution():
    one, two = numbers(3, 5, seed=1), numbers(4, 2, K, K, seed=2)
    made = torch.kron(one.double()[..., None, None], two.double())
    return KERNEL, parts(lokr_w1=one, lokr_w2=two), add(made)


def lokr_flat_convolution():
    one, c, d = numbers(3, 5, seed=1), numbers(4, RANK, seed=3), numbers(RANK, 2 * K * K, seed=4)
    two = (c.double() @ d.double()).view(4, 2, K, K)
    return (
        KERNEL,
        parts(lokr_w1=one, lokr_w2_a=c, lokr_w2_b=d, alpha=1.5),
        add(torch.kron(one.double()[..., None, None], two) / 2),
    )


def lokr_with_core():
    one, t, a, b = (
        numbers(3, 5, seed=1),
        numbers(RANK, RANK, K, K, seed=2),
        numbers(RANK, 4, seed=3),
        numbers(RANK, 2, seed=4),
    )
    two = torch.einsum("rskl,ro,si->oikl", t.double(), a.double(), b.double()).contiguous()
    made = torch.kron(one.double()[..., None, None], two)
    return KERNEL, parts(lokr_w1=one, lokr_t2=t, lokr_w2_a=a, lokr_w2_b=b, alpha=3.0), add(made)


def dora(shape: tuple[int, ...], magnitude: tuple[int, ...], axis: int):
    up, down = numbers(OUT, RANK, *(1 for _ in shape[2:]), seed=1), numbers(RANK, *shape[1:], seed=2)
    lengths = numbers(*magnitude, seed=3).abs()
    others = [n for n in range(len(shape)) if n != axis]

    def formula(weight: torch.Tensor) -> torch.Tensor:
        longer = weight + 0.5 * (up.double().flatten(1) @ down.double().flatten(1)).view(shape)
        along = [-1 if n == axis else 1 for n in range(len(shape))]
        return longer / longer.square().sum(dim=others, keepdim=True).sqrt() * lengths.double().flatten().view(along)

    return shape, parts(lora_up__weight=up, lora_down__weight=down, alpha=1.5, dora_scale=lengths), formula


def lycoris_ia3(axis: int, dtype: torch.dtype = torch.int64):
    vector = numbers(1, IN, seed=1) if axis else numbers(OUT, 1, seed=1)
    on_input = torch.tensor(axis).to(dtype)
    return FLAT, parts(weight=vector, on_input=on_input), lambda w: w * (1 + vector.double())


def glora(*, old: bool):
    a, b = double(IN, RANK, seed=1), double(RANK, IN, seed=2)
    c, d = double(OUT, RANK, seed=3), double(RANK, IN, seed=4)
    named = {"a2": a, "a1": b, "b2": c, "b1": d} if old else {"a1": a, "a2": b, "b1": c, "b2": d}
    tensors = {f"{name}__weight": tensor.float() for name, tensor in named.items()}
    return FLAT, parts(**tensors, alpha=1.5), lambda w: w + 0.5 * (w @ a @ b + c @ d)


def whole(role: str):
    tensor = numbers(*KERNEL, seed=1)
    return KERNEL, parts(**{role: tensor}), add(tensor.double())


CASES: dict[str, tuple[tuple[int, ...], Tensors, Formula]] = {
    "LoRA": lora(FLAT, (OUT, RANK), (RANK, IN), 1.5),
    "LoRA, no alpha": lora(FLAT, (OUT, RANK), (RANK, IN)),
    "LoRA, 1×1": lora((OUT, IN, 1, 1), (OUT, RANK, 1, 1), (RANK, IN, 1, 1), 2.0),
    "LoRA, 1×1 for a matrix": lora(FLAT, (OUT, RANK, 1, 1), (RANK, IN, 1, 1), 2.0),
    "LoRA, a matrix for 1×1": lora((OUT, IN, 1, 1), (OUT, RANK), (RANK, IN), 2.0),
    "LoRA, 3×3": lora(KERNEL, (OUT, RANK, 1, 1), (RANK, IN, K, K), 1.0),
    "LoRA, three dimensions": lora((OUT, IN, 2, K, K), (OUT, RANK, 1, 1, 1), (RANK, IN, 2, K, K), 1.0),
    "LoRA with a core": lora_with_core(),
    "LoHa": loha(FLAT, IN),
    "LoHa, 3×3": loha(KERNEL, IN * K * K),
    "LoHa with cores": loha_with_core(),
    "LoKr, whole": lokr_whole(),
    "LoKr, of factors": lokr_factored(),
    "LoKr, 3×3": lokr_convolution(),
    "LoKr, 3×3 of factors": lokr_flat_convolution(),
    "LoKr with a core": lokr_with_core(),
    "DoRA, outputs": dora(FLAT, (OUT, 1), 0),
    "DoRA, inputs": dora(FLAT, (1, IN), 1),
    "DoRA, outputs of 3×3": dora(KERNEL, (OUT, 1, 1, 1), 0),
    "DoRA, inputs of 3×3": dora(KERNEL, (1, IN, 1, 1), 1),
    "(IA)³ on outputs": lycoris_ia3(0),
    "(IA)³ on inputs": lycoris_ia3(1),
    "(IA)³ on outputs, as a truth": lycoris_ia3(0, torch.bool),
    "(IA)³ on inputs, as a truth": lycoris_ia3(1, torch.bool),
    "GLoRA": glora(old=False),
    "GLoRA, old": glora(old=True),
    "difference": whole("diff"),
}


@pytest.mark.parametrize("weight", [1.0, 0.7, -0.5])
@pytest.mark.parametrize("case", CASES)
def test_a_kind_is_its_formula(tmp_path, case, weight):
    shape, adapter, formula = CASES[case]
    before = numbers(*shape, seed=9)
    made = bake(tmp_path, {WEIGHT: before, "other.weight": before.clone()}, adapter, weights=weight)
    exact = before.double() + weight * (formula(before.double()) - before.double())
    assert torch.allclose(made[WEIGHT].double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(made["other.weight"], before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_other_dtypes(tmp_path, case, dtype):
    shape, adapter, formula = CASES[case]
    before = numbers(*shape, seed=9, dtype=dtype)
    halves = {
        name: tensor.half() if tensor.is_floating_point() and tensor.ndim else tensor
        for name, tensor in adapter.items()
    }
    made = bake(tmp_path, {WEIGHT: before}, halves)
    assert made[WEIGHT].dtype == dtype
    assert torch.allclose(made[WEIGHT].double(), formula(before.double()), rtol=2e-2, atol=2e-2)


def test_biases(tmp_path):
    weight, bias = numbers(OUT, IN, seed=9), numbers(OUT, seed=8)
    up, down, difference = numbers(OUT, RANK, seed=1), numbers(RANK, IN, seed=2), numbers(OUT, seed=3)
    adapter = parts(lora_up__weight=up, lora_down__weight=down, diff_b=difference)
    made = bake(tmp_path, {WEIGHT: weight, BIAS: bias}, adapter, weights=0.5)
    assert torch.allclose(made[BIAS], bias + 0.5 * difference, atol=1e-7)
    assert torch.allclose(made[WEIGHT].double(), weight.double() + 0.5 * up.double() @ down.double(), atol=1e-6)


def test_norms(tmp_path):
    weight, bias = numbers(OUT, seed=9), numbers(OUT, seed=8)
    adapter = parts(w_norm=numbers(OUT, seed=1), b_norm=numbers(OUT, seed=2))
    made = bake(tmp_path, {WEIGHT: weight, BIAS: bias}, adapter)
    assert torch.allclose(made[WEIGHT], weight + numbers(OUT, seed=1), atol=1e-7)
    assert torch.allclose(made[BIAS], bias + numbers(OUT, seed=2), atol=1e-7)


def test_what_is_set_stands_in_the_tensors_place(tmp_path):
    weight, other = numbers(OUT, IN, seed=9), numbers(OUT, IN, seed=1)
    assert torch.equal(bake(tmp_path, {WEIGHT: weight}, parts(set_weight=other))[WEIGHT], other)


def test_the_strength_of_lora_and_its_bias_is_one(tmp_path):
    weight, bias = numbers(OUT, IN, seed=9), numbers(OUT, seed=8)
    tensors = {"lora_B__weight": numbers(OUT, RANK, seed=1), "lora_A__weight": numbers(RANK, IN, seed=2)}
    adapter = parts(**tensors, lora_B__bias=numbers(OUT, seed=3), alpha=6.0)
    made = bake(tmp_path, {WEIGHT: weight, BIAS: bias}, adapter)
    assert torch.allclose(made[BIAS], bias + 2 * numbers(OUT, seed=3), atol=1e-6)


def test_a_row_without_length_stays_one(tmp_path):
    """DoRA divides by lengths, and 0 is one that may occur: in pruned models."""
    weight = numbers(OUT, IN, seed=9)
    weight[3] = 0
    up, down = numbers(OUT, RANK, seed=1), numbers(RANK, IN, seed=2)
    up[3] = 0
    adapter = parts(lora_up__weight=up, lora_down__weight=down, dora_scale=torch.ones(OUT, 1))
    made = bake(tmp_path, {WEIGHT: weight}, adapter)
    assert torch.equal(made[WEIGHT][3], torch.zeros(IN))
    assert torch.allclose(made[WEIGHT][0].norm(), torch.ones(()), atol=1e-5)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    "alpha",
    [
        *(torch.tensor(6, dtype=torch.int64), torch.tensor([6.0]).bfloat16()),
        *(torch.tensor(6.0).to(dtype) for dtype in FLOAT8),
    ],
)
def test_alphas_of_any_dtype(tmp_path, alpha):
    weight, (_, adapter, _) = numbers(OUT, IN, seed=9), CASES["LoRA, no alpha"]
    made = bake(tmp_path, {WEIGHT: weight}, {**adapter, f"{MODULE}.alpha": alpha})
    product = adapter[f"{MODULE}.lora_up.weight"].double() @ adapter[f"{MODULE}.lora_down.weight"].double()
    assert torch.allclose(made[WEIGHT].double(), weight.double() + 2 * product, atol=1e-6)
