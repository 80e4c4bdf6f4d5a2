"""What this machine is, and what ``auto`` therefore means on it."""
