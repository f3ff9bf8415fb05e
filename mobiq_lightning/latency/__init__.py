"""How long products with sliced weights take on this machine, beside plain weights and beside what memory allows.

`command` is what ``python -m mobiq_lightning latency`` runs; `sections` and `gpu_sections` hold what it measures. The products
come from `kernel_products` on CUDA and from `reference_products` on a CPU; every figure says which of the two it is of.
"""
