"""The tests. A package, so that files import each other's helpers by one name: ``tests.support.cuda.cuda_tools``."""
