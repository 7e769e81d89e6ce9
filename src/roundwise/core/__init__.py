"""Tensor maths: Hessian, grids, solver, packing. Depends on torch only, not on models or files."""
