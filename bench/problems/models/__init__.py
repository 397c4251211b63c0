"""What is timed as a whole, of many operators."""
