"""What machine code for NVIDIA GPUs costs, read without one: README.md beside this file."""
