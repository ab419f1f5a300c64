"""Raise while loading, in the style of a class."""


class Service:
    def initialize(self, context):
        raise RuntimeError("the labels are missing")

    def handle(self, data, context):
        return data
