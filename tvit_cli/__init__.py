"""The package's version; everything else is imported late."""

__version__ = "0.1.0"
