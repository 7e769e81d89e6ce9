"""Kernels that multiply with packed weights, one file each; `dispatch` chooses among them."""
