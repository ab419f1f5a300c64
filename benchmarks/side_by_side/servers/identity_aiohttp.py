"""A bare echo on aiohttp and uvloop: what any server on them pays for the bytes alone.

Its malloc keeps what is freed, as this project's does; else its figures have two modes, one twice the other.
"""

import asyncio

import job
import uvloop
from aiohttp import web

from mms_lite import memory


async def echo(request: web.Request) -> web.Response:
    """Answer with the body."""
    return web.Response(body=await request.read(), content_type="application/octet-stream")


if __name__ == "__main__":
    memory.keep_freed()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/{path:.*}", echo)
    job.tell()
    web.run_app(app, host="127.0.0.1", port=job.JOB["port"], access_log=None, print=None)
