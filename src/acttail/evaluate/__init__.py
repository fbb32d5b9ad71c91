"""Numbers that say what sparsity costs and gains."""
