"""Compiled loops: what the CPU computes by one call a block, with the interpreter's lock given up.

Every file is of plain loops with their formulas above them:

    elements.c       how elements lie in files: float16, bfloat16, float8, float32, float64, and how they are rounded
    program.c        a tensor's expression as steps over registers that stay in the first-level cache
    sparse.inc       steps of methods on sparse task vectors: what is kept, which sign is elected, what is summed
    elementwise.inc  steps of methods that are arithmetic of elements
    random.c         random numbers by the place of an element; random.inc has the steps that draw them
    ranks.inc        how magnitudes rank in their rows, and what is kept by it, for a step that goes by it
    gram.c           inner products, added up by halves
    magnitudes.c     what passes for ranks and norms ask of magnitudes; magnitudes.py asks it
    library.py       finds the library that was built with the package; program.py writes an expression's steps, and
                     blocks.py has them run

Their arithmetic is that of the path by torch, step for step, so that the bytes are the same: which of the two computed
an output can't be told from it. A step is added to `enum code` in program.h, to `take` in program.inc, and to
program.py, beside the case of `compute.evaluate` that it stands for. A block method says by its `kernel` of which steps
it consists; where it is `elementwise`, they follow from its function. What is measured of whole tensors is added to
`Kernels`, for passes to ask of their `Operands`. tests/compute/test_kernels*.py compare the two.
"""
