"""The catalogue: 231 papers, and the methods that are built. Imports no torch."""

from regard.catalog.registry import Method, Tags, create, get, method, methods

__all__ = ["Method", "Tags", "create", "get", "method", "methods"]
