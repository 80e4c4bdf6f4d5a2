"""Verbs that let a model answer: one prompt, or a conversation."""
