"""Elastic quantization of language models: one checkpoint that runs at any average bit-width from 2 to 8.

Importing this package makes `transformers.AutoModelForCausalLM.from_pretrained` know elastic checkpoints.
"""

import lazy_loader

from mobiq_lightning.checkpoint import register_with_transformers

# On demand: the command line answers a typo before PyTorch is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_transformers()
