"""How much of an earlier task is replayed: its share of the samples, and what is kept of its data."""
