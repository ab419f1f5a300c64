"""mms-lite: a small, fast model server. Importing the package imports nothing else."""

__version__ = "0.1.0"
