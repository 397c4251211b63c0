"""Readers of quantised checkpoint formats: one module per format, imported when asked for."""
