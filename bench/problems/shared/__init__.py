"""What the problems have in common."""
