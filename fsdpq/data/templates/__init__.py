"""Chat templates: which one a run uses, and what it makes of a conversation."""
