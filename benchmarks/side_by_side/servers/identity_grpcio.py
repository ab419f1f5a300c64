"""A bare echo on grpc.aio and uvloop: what any server on them pays for the bytes alone.

Its malloc keeps what is freed, as this project's does; else its figures have two modes, one twice the other.
"""

import asyncio

import grpc
import job
import uvloop

from mms_lite import memory

UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


async def echo(message: bytes, context: grpc.aio.ServicerContext) -> bytes:
    """Answer with the message."""
    return message


class Every(grpc.GenericRpcHandler):
    """Has the same method for every name."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return it."""
        return grpc.unary_unary_rpc_method_handler(echo)


async def serve() -> None:
    """Serve until the process ends."""
    server = grpc.aio.server(handlers=[Every()], options=UNBOUNDED)
    server.add_insecure_port(f"127.0.0.1:{job.JOB['port']}")
    await server.start()
    job.tell()
    await server.wait_for_termination()


if __name__ == "__main__":
    memory.keep_freed()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(serve())
