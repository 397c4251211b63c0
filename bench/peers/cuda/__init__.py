"""Packages that compute on a GPU."""
