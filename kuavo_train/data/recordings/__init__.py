"""A dataset as its files hold it, and what can be wrong with it."""
