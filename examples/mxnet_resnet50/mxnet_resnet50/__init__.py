"""The model folder that model-archiver packs: the handler, the class names and, once fetched, the weights."""
