"""Pure functions of numbers and tensors: budgets, relations, losses."""
