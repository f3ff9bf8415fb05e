"""Outlier migration: which tokens suffer most from quantization changes with the precision.

The motivating study of MoBiQuant (arXiv 2602.20191): what is calibrated for one precision does not fit another.
"""
