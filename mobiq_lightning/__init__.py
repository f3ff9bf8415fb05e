"""Elastic quantization of language models: one checkpoint that runs at any average bit-width from 2 to 8."""

__version__ = "0.1.0"
