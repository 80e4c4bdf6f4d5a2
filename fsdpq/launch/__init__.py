"""From a checked recipe to running ranks and back: devices, run directory, torchrun, failures.

Torch-free. A run is started as processes and read through its directory; nothing here prints.
"""
