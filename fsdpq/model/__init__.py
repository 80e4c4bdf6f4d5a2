"""The base model: built on meta, its linears swapped for quantized ones, loaded by row slices."""
