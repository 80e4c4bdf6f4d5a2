"""What a model is worth: losses over rows and texts, tasks of lm-evaluation-harness."""
