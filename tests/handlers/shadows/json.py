raise ImportError("a model's json.py must not take the place of the standard one")
