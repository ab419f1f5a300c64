"""A class with initialize and handle."""


class Helper:
    __module__ = "elsewhere"  # classes that are only imported do not count


class Service:
    def initialize(self, context):
        self.name = context.model_name

    def handle(self, data, context):
        return [f"{self.name}:{item['body'].decode()}" for item in data]
