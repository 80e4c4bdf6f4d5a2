"""fsdpq: finetune large language models on the GPUs people have.

A YAML recipe selects model, quantizer, adapter, sharding and data; ``fsdpq train recipe.yaml``
runs it with quantized weights sharded by FSDP2. The package has two halves that meet in a file:
the torch-free front half (``cli``, ``launch``, ``fetch``, ``registry``, ``recipe``) and the worker
half (``worker`` and everything below it), which runs once per rank under torchrun.
"""

__version__ = "0.1.0"
