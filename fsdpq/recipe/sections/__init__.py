"""One module a section of the recipe: the pydantic models of what it may hold.

A section without kinds has one ``*Options`` class; a section with kinds has one a kind, and a union
that tells them apart by ``kind``.
"""
