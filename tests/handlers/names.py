"""Import the names that a body lists (`module:name.name`) and tell the parameters of each."""

import importlib
import inspect
import json


def find(path):
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def parameters(thing):
    if isinstance(thing, property):
        return "property"
    if not inspect.isfunction(thing):
        return type(thing).__name__
    # As the caller must write them: the annotations do not count.
    found = inspect.signature(thing).parameters.values()
    return [[each.name, None if each.default is each.empty else repr(each.default)] for each in found]


def handle(data, context):
    if data is None:
        return None
    return [{path: parameters(find(path)) for path in json.loads(bytes(item["body"]))} for item in data]
