"""What a run reads, brought to this machine or made: model, base, data; for smoke runs made up."""
