"""What a robot process imports."""
