"""Never finish loading."""

import time


def handle(data, context):
    while data is None:
        time.sleep(60)
    return data
