"""Products with packed weights: one file a kernel, and `dispatch`, which chooses among them."""
