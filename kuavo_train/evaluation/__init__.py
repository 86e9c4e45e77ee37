"""What a policy can do after each stage: validation, the performance matrix, forgetting and its intervals."""
