"""Model archives (.mar): `manifest` describes one, `archive` reads one from a stranger, `packing` writes one.

Importing the package imports nothing else, and nothing here imports the server.
"""
