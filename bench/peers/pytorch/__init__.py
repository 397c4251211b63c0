"""What torch has itself, eager and compiled."""
