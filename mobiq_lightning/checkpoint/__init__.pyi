# What others may use of this package; `__init__.py` loads it when it is asked for.
from .card import write_card as write_card
from .exporting import export as export
from .format import QUANT_METHOD as QUANT_METHOD
from .format import ElasticFormat as ElasticFormat
from .loading import load as load
from .loading import resolve as resolve
from .provenance import describe_provenance as describe_provenance
from .quantizer import insert_elastic_linears as insert_elastic_linears
from .registration import register_with_transformers as register_with_transformers
from .summary import SCALES as SCALES
from .summary import VALUE_TABLES as VALUE_TABLES
from .summary import Summary as Summary
from .summary import skeleton as skeleton
from .summary import summarize_checkpoint as summarize_checkpoint
from .verification import verify as verify
from .write import CheckpointWriter as CheckpointWriter
from .write import add_results as add_results
