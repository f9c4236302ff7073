"""Jobs that hand models and vectors to users."""
