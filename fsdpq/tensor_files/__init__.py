"""Reads safetensors files and directories of them, without torch."""
