"""Measuring what a policy can do after each stage: validation, the performance matrix, forgetting, its intervals."""
