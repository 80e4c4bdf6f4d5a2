"""What the tests share: tiny models, and ranks that live as long as the session."""
