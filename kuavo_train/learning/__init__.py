"""Training one stage: build the policy, freeze, loop, checkpoint. Knows no task names."""
