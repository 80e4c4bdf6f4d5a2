"""Answers of a trained model: one prompt or a conversation, token by token."""
