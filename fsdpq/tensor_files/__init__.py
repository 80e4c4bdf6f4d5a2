"""Safetensors files as both halves see them: headers and byte ranges, without torch."""
