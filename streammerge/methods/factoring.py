"""The nearest matrices of low rank, as two factors: M ≈ B A = (U S) Vᵀ, of the largest singular values.

    of a product    M = L R: QR of both factors, and the decomposition of what is between them; M is never there
    exact           the Gram matrix of the shorter side, in float64: V, and then M V in one more pass over M
    randomized      a subspace of a few directions more, improved twice: no more than the factors is held

However M's eigenvectors are rounded, B A is M projected on some orthonormal directions: at full rank that is M itself.
Each singular value is shared by its vectors of B and A, so that float16 holds them where it would not hold U S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from streammerge.errors import MethodError
from streammerge.methods.contract import Parameters
from streammerge.methods.decompositions import ITERATIONS, NOTHING, OVERSAMPLING, decompose_at_random, decomposed
from streammerge.methods.matrices import BAND, PIECE, Tall, greatest
from streammerge.methods.registry import WholeMethod

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target

EXACT_SIDE: Final = 2048
"""The longest shorter side of matrices that are decomposed exactly unless something else is asked for: the Gram matrix
of a longer one takes more memory and time than most have."""

TOLD: Final = 2
"""Numbers behind the factors: the norm of the matrix, and of what they don't hold."""

BEFORE: Final = 2
"""Numbers before singular values: the matrix's norm, and its greatest magnitude."""


@dataclass(frozen=True, slots=True)
class Factors:
    """B (m × r) and A as Aᵀ (n × r), in float64, the norm of B A, and that of the matrix."""

    left: Tensor
    right: Tensor
    kept: float
    whole: float

    def packed(self, missed: float | None = None, *, turned: bool = False) -> Tensor:
        """B and A by rows, or if they are `turned` Aᵀ and Bᵀ, and what is told of them, one after the other.

        `missed` is given where it isn't the rest.
        """
        import torch

        rest = math.sqrt(max(self.whole**2 - self.kept**2, 0.0)) if missed is None else missed
        told = torch.tensor([self.whole, rest], dtype=torch.float64, device=self.left.device)
        left, right = reversed(self._shared()) if turned else self._shared()
        return torch.cat([left.reshape(-1), right.T.reshape(-1), told])

    def _shared(self) -> tuple[Tensor, Tensor]:
        """B and Aᵀ, of which every column of one is about as long as that of the other: powers of two are moved from
        one to the other, which changes nothing of B A."""
        import torch

        lengths, others = (side.square().sum(0).sqrt() for side in (self.left, self.right))
        there = (lengths > 0) & (others > 0)
        half = (lengths / others.where(there, 1.0)).where(there, 1.0).frexp().exponent // 2
        factor = torch.exp2(half.double())
        return self.left / factor, self.right * factor


def is_exact(svd: str, rows: int, columns: int) -> bool:
    """Whether a matrix of this shape is decomposed exactly."""
    return svd == "exact" or (svd == "auto" and min(rows, columns) <= EXACT_SIDE)


# ── matrices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _factors(
    matrix: Tall,
    *,
    place: Place,
    rows: int,
    columns: int,
    rank: int,
    svd: str,
    clamp: float = 1.0,
    turned: bool = False,
) -> Tensor:
    """B A ≈ M"""
    whole = _norm(matrix)
    _refuse_nonfinite(place.tensor.name, whole)
    if is_exact(svd, rows, columns):
        left, right = _exactly(matrix, rank)
    else:
        found = decompose_at_random(matrix, rank, place.generator(0))
        left, right = (matrix @ (found.left * found.values)).matrix(), found.right
    made = _tidied(left, right, whole)
    if clamp >= 1:
        return made.packed(turned=turned)
    cut = clamped(made, clamp)
    return cut.packed(_missed(matrix, cut), turned=turned)


def _exactly(matrix: Tall, rank: int) -> tuple[Tensor, Tensor]:
    """M V and V, or Uᵀ's sides, of the `rank` greatest singular values."""
    import torch

    squares, vectors = decomposed(lambda upper: torch.linalg.eigh(upper, UPLO="U"), gram(matrix))
    kept = vectors[:, len(squares) - rank :].flip(1).contiguous()
    del squares, vectors
    if matrix.rows >= matrix.columns:
        return (matrix @ kept).matrix(), kept
    across = matrix.inner(Tall.held(kept))  # Mᵀ U = V S
    lengths = across.square().sum(0).sqrt()
    there = lengths > 0
    return kept * lengths, across * there / lengths.where(there, 1.0)


def gram(matrix: Tall) -> Tensor:
    """The Gram matrix of the shorter side, above the diagonal and on it."""
    import torch

    size = min(matrix.rows, matrix.columns)
    total = torch.zeros(size, size, dtype=torch.float64, device=matrix.device)
    if matrix.rows >= matrix.columns:
        for rows in matrix.cuts():
            piece = matrix.piece(rows)
            for first in range(0, size, BAND):
                total[first : first + BAND, first:].addmm_(piece[:, first : first + BAND].T, piece[:, first:])
        return total
    step = _wide_step(matrix.rows, matrix.columns)
    for first in range(0, matrix.rows, step):
        upper = slice(first, min(first + step, matrix.rows))
        above = matrix.piece(upper)
        total[upper, upper] = above @ above.T
        for rows in matrix.cuts():
            below = slice(max(rows.start, upper.stop), rows.stop)
            if below.start < below.stop:
                total[upper, below] = above @ matrix.piece(below).T
    return total


def _wide_step(rows: int, columns: int) -> int:
    """How many rows of a matrix with long ones are held at once: as many elements as the half of its Gram matrix."""
    return min(max(rows * rows // (2 * columns), PIECE // columns, 1), rows)


def _tidied(left: Tensor, right: Tensor, whole: float) -> Factors:
    """The factors, the greatest of each right vector positive; none where the matrix has no direction any more."""
    lengths = left.square().sum(0).sqrt()
    there = lengths > NOTHING * whole
    if right.numel():
        greatest = right.gather(0, right.abs().argmax(0, keepdim=True))
        signs = (greatest.sign() + (greatest == 0)) * there
        left, right = left * signs, right * signs
    return Factors(left, right, float((lengths * there).square().sum().sqrt()), whole)


def _norm(matrix: Tall) -> float:
    """‖M‖"""
    squares = (float(matrix.piece(rows).square().sum()) for rows in matrix.cuts() if matrix.columns)
    return math.sqrt(math.fsum(squares)) if matrix.rows else 0.0


def _refuse_nonfinite(name: str, *numbers: float) -> None:
    if not all(map(math.isfinite, numbers)):
        raise MethodError(
            f"{name}: the difference holds infinite values or NaNs, and has no factors",
            advice="Mend the input, or leave the tensor out.",
        )


def clamped(made: Factors, quantile: float) -> Factors:
    """The factors with all their elements within ± this quantile of them, as kohya's tools cut them."""
    import torch

    if not made.left.numel():
        return made
    both = torch.cat([made.left.reshape(-1), made.right.reshape(-1)])
    place = quantile * (len(both) - 1)
    low, high = (float(both.kthvalue(int(at) + 1).values) for at in (math.floor(place), math.ceil(place)))
    most = abs(low + (place - math.floor(place)) * (high - low))
    left, right = made.left.clamp(-most, most), made.right.clamp(-most, most)
    return Factors(left, right, _product_norm(left, right), made.whole)


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖B A‖ of factors, whose product is not made."""
    return math.sqrt(max(float(((left.T @ left) * (right.T @ right)).sum()), 0.0))


def _missed(matrix: Tall, made: Factors) -> float:
    """‖M − B A‖"""
    total = 0.0
    for rows in matrix.cuts():
        total += float((matrix.piece(rows) - made.left[rows] @ made.right.T).square().sum())
    return math.sqrt(total)


def _values(matrix: Tall, *, place: Place, rows: int, columns: int, count: int, svd: str) -> Tensor:
    """‖M‖, the greatest magnitude, and the `count` largest singular values."""
    import torch

    squares, sizes = [0.0], [0.0]
    for each in matrix.cuts():
        piece = matrix.piece(each)
        squares.append(float(piece.square().sum()))
        sizes.append(float(piece.abs().max()))
    whole = math.sqrt(math.fsum(squares)) if math.isfinite(max(squares)) else math.nan
    found = torch.zeros(count, dtype=torch.float64, device=matrix.device)
    if count and whole and math.isfinite(whole):
        if is_exact(svd, rows, columns):
            (ascending,) = decomposed(lambda upper: torch.linalg.eigvalsh(upper, UPLO="U"), gram(matrix))
            found = ascending.flip(0)[:count].clamp(min=0).sqrt()
        else:
            found = decompose_at_random(matrix, count, place.generator(0)).values
    before = torch.tensor([whole, max(sizes)], dtype=torch.float64, device=found.device)
    return torch.cat([before, found])


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Core:
    """L = `left` · …, R = … · `right`ᵀ with orthonormal columns, and what is between them."""

    left: Tensor
    right: Tensor
    between: Tensor


def _core(matrices: Sequence[Tall], coefficients: Sequence[float]) -> _Core:
    """Σᵢ cᵢ Lᵢ Rᵢ, for matrices L₁, R₁, L₂, R₂, …"""
    import torch

    lefts = [c * each.matrix() for c, each in zip(coefficients, matrices[::2], strict=True)]
    rights = [each.matrix() for each in matrices[1::2]]
    left, left_rest = torch.linalg.qr(torch.cat(lefts, dim=1))
    right, right_rest = torch.linalg.qr(torch.cat(rights).T)
    return _Core(left, right, left_rest @ right_rest.T)


def _factors_of_products(
    *matrices: Tall,
    place: Place,
    coefficients: Sequence[float],
    rows: int,
    columns: int,
    rank: int,
    clamp: float = 1.0,
    turned: bool = False,
    inner: int = 0,
) -> Tensor:
    """B A ≈ Σᵢ cᵢ Lᵢ Rᵢ"""
    import torch

    core = _core(matrices, coefficients)
    whole = float(core.between.square().sum().sqrt())
    _refuse_nonfinite(place.tensor.name, whole)
    outer, values, inside = decomposed(lambda between: torch.linalg.svd(between, full_matrices=False), core.between)
    left = core.left @ (outer[:, :rank] * values[:rank])
    made = _tidied(left, core.right @ inside[:rank].T, whole)
    if clamp >= 1:
        return made.packed(float(values[rank:].square().sum().sqrt()), turned=turned)
    cut = clamped(made, clamp)
    across = (cut.left.T @ core.left) @ core.between @ (core.right.T @ cut.right)
    missed = whole**2 - 2 * float(across.diagonal().sum()) + cut.kept**2
    return cut.packed(math.sqrt(max(missed, 0.0)), turned=turned)


def _values_of_products(
    *matrices: Tall,
    place: Place,
    coefficients: Sequence[float],
    rows: int,
    columns: int,
    count: int,
    inner: int = 0,
    measured: bool = False,
) -> Tensor:
    """The norm of Σᵢ cᵢ Lᵢ Rᵢ, its greatest magnitude if that is `measured`, else the norm again, and its singular
    values."""
    import torch

    core = _core(matrices, coefficients)
    whole = core.between.square().sum().sqrt()
    found = torch.zeros(count, dtype=torch.float64, device=whole.device)
    if math.isfinite(float(whole)):
        found = decomposed(torch.linalg.svdvals, core.between)[0][:count]
    most = greatest(_sum(core, rows, columns)) if measured else float(whole)
    return torch.cat([whole[None], whole.new_tensor([most]), found])


def _sum(core: _Core, rows: int, columns: int) -> Tall:
    """The sum of products itself, some rows at a time."""
    right = core.between @ core.right.T
    return Tall.of(rows, columns, right.device, lambda piece: core.left[piece] @ right)


# ── what they take ───────────────────────────────────────────────────────────────────────────────────────────────────


def _held(target: Target, parameters: Parameters) -> int:
    """The Gram matrix, its vectors and what finds them, or directions of both sides; pieces; the factors."""
    rows, columns = _number(parameters, "rows"), _number(parameters, "columns")
    rank, side = _number(parameters, "rank", "count"), min(rows, columns)
    piece = 6 * min(max(PIECE, columns), rows * columns)
    if not rank:
        work = 0.0
    elif is_exact(str(parameters["svd"]), rows, columns):
        wide = _wide_step(rows, columns) * columns if rows < columns else 0
        work = max(4.3 * side * side, side * side + wide)
    else:
        work = 5 * (rows + columns) * min(rank + OVERSAMPLING, side)
    return 8 * int(work + piece + 4 * (rows + columns) * min(rank, side))


def _held_of_products(target: Target, parameters: Parameters) -> int:
    """Both sides' factors, as they are read, side by side, and orthonormal; the matrices between them."""
    rows, columns = _number(parameters, "rows"), _number(parameters, "columns")
    inner, rank = _number(parameters, "inner"), _number(parameters, "rank", "count")
    pieces = 2 * min(max(PIECE, columns), rows * columns) + columns * inner if parameters.get("measured") else 0
    return 8 * (4 * (rows + columns) * inner + 6 * inner * inner + 4 * (rows + columns) * rank + pieces)


def _number(parameters: Parameters, *names: str) -> int:
    value: Any = next(parameters[name] for name in names if name in parameters)
    return int(value)


def _readings(parameters: Parameters) -> int:
    """How often the matrix is gone over."""
    if parameters.get("count") == 0:
        return 1
    rows, columns = _number(parameters, "rows"), _number(parameters, "columns")
    if not is_exact(str(parameters["svd"]), rows, columns):
        return 2 + 2 * (ITERATIONS + 1)
    if rows >= columns:
        return 3
    return 3 + -(-rows // _wide_step(rows, columns)) // 2


FACTORS: Final = WholeMethod(
    "factors", (), "none", (1, 1), "B A ≈ M", function=_factors, temporaries=0, held=_held, anywhere=True,
    readings=_readings,
)  # fmt: skip

VALUES: Final = WholeMethod(
    "singular values", (), "none", (1, 1), "S of M = U S Vᵀ", function=_values, temporaries=0, held=_held,
    anywhere=True, readings=_readings,
)  # fmt: skip

FACTORS_OF_PRODUCTS: Final = WholeMethod(
    "factors of products", (), "none", (2, None), "B A ≈ Σᵢ cᵢ Lᵢ Rᵢ", function=_factors_of_products, temporaries=0,
    held=_held_of_products, anywhere=True, readings=lambda _: 1,
)  # fmt: skip

VALUES_OF_PRODUCTS: Final = WholeMethod(
    "singular values of products", (), "none", (2, None), "S of Σᵢ cᵢ Lᵢ Rᵢ = U S Vᵀ", function=_values_of_products,
    temporaries=0, held=_held_of_products, anywhere=True, readings=lambda _: 1,
)  # fmt: skip
