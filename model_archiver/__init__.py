"""Model archives (.mar): `manifest` describes one, `archive` reads one from a stranger, `packing` writes one.

`model_files` says what belongs to a bare model file. Importing the package imports nothing else, and nothing
here imports the server.
"""
