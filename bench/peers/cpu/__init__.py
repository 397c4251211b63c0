"""Packages that compute on a CPU."""
