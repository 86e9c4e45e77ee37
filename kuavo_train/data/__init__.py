"""What the policy learns from: tasks, their mixture, the normalization they share; pictures in data/images."""
