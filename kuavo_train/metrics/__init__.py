"""What forgetting is: pure functions of numbers."""
