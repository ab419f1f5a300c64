"""Raise while loading, in the style of a function."""

import os


def handle(data, context):
    if data is None:
        with open(os.path.join(context.system_properties["model_dir"], "attempts"), "a") as file:
            file.write("x")
        raise RuntimeError("the weights are missing")
    return data
