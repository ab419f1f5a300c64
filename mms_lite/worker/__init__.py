"""The child process: blocking code, standard library alone until a model asks for more."""
