"""Adapters, one module for each package that they wrap; ``README.md`` is their table.

A module has a list ``PROVIDERS`` and imports what it wraps inside ``build``, so that importing it needs nothing.
"""

# In the order of tables, ours first.
MODULES = ["ours", "vendor", "eager", "compiled"]
