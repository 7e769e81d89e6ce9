"""Pure tensor maths: Hessian, grid, solver, packing. Knows torch; nothing of models or files."""
