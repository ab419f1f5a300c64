"""The import names of other servers. This folder goes on the worker's sys.path, before site-packages."""
