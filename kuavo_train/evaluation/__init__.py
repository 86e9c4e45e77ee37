"""How good a policy is: held-out questions, and closed loop."""
