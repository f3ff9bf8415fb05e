"""Comparisons: a grid of strategies and seeds, each cell a run of its own, at equal used bits in one table."""
