"""qops inside other libraries: a module for each, which imports it, so that `import qops` need not."""
