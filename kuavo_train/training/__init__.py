"""How one stage learns: build the policy, freeze, loop, checkpoint. Knows no task names."""
