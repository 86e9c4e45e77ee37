"""A policy over the network: robots ask, and each has an episode of its own."""
