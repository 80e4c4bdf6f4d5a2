"""Sharding by FSDP2: meshes and groups."""
