"""What is measured on text before a budget is decided: curves and thresholds."""
