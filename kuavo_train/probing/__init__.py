"""What a policy does inside: its memory, its language, what it recovers."""
