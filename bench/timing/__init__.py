"""How calls are timed: on which devices, by whom and when, and the documents that keep it."""
