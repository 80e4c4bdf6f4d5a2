"""What a run leaves on disk: adapters in PEFT's format."""
