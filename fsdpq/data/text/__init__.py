"""From a row to text, tokens and the mask of those that carry loss."""
