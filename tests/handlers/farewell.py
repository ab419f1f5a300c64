"""Log and print when the model is let go: at a normal end, not when the process is killed."""

import logging
import os
import sys


class Model:
    def __init__(self):
        self.folder = None

    def __del__(self):
        logging.info("%s: logged by %s", FAREWELL, os.path.basename(self.folder))
        print(f"{FAREWELL}: printed", file=sys.stderr)


FAREWELL = "goodbye"
model = Model()


def handle(data, context):
    model.folder = context.system_properties["model_dir"]
    return data and [item["body"] for item in data]
