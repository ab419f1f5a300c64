"""Cut a frozen TensorFlow graph at one of its nodes, without TensorFlow.

The nodes that are kept are copied byte for byte; of the protobuf format only the walk over fields is needed.
Numbers of fields are from tensorflow/core/framework/graph.proto and node_def.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

GRAPH_NODE = 1
NODE_NAME, NODE_INPUT = 1, 3
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def cut(graph: bytes, output: str) -> bytes:
    """Keep the node `output`, all that it is computed from, and what is not a node (the versions).

    Raises:
        ValueError: if the graph is damaged, or has no such node or a node that one of the kept ones reads.
    """
    inputs: dict[str, list[str]] = {}
    for number, node, _raw in fields(graph):
        if number == GRAPH_NODE:
            name, sources = read_node(node)
            inputs[name] = sources
    kept, waiting = set(), [output]
    while waiting:
        name = waiting.pop()
        if name not in inputs:
            raise ValueError(f"the graph has no node {name}")
        if name not in kept:
            kept.add(name)
            waiting += inputs[name]
    return b"".join(
        raw for number, value, raw in fields(graph) if number != GRAPH_NODE or read_node(value)[0] in kept
    )


def read_node(node: bytes) -> tuple[str, list[str]]:
    """Return a node's name and the names of the nodes that it reads."""
    name, inputs = "", []
    for number, value, _raw in fields(node):
        if number == NODE_NAME:
            name = value.decode()
        elif number == NODE_INPUT:
            # "^name" only waits for the node, "name:1" reads its second output.
            inputs.append(value.decode().removeprefix("^").partition(":")[0])
    return name, inputs


def fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield each field of a protobuf message: its number, its content, and all of its bytes.

    The content of a number is empty: nothing here reads one.
    """
    start = 0
    while start < len(message):
        key, position = varint(message, start)
        wire_type = key & 7
        if wire_type == VARINT:
            content = end = varint(message, position)[1]
        elif wire_type in (FIXED64, FIXED32):
            content = end = position + (8 if wire_type == FIXED64 else 4)
        elif wire_type == BYTES:
            length, content = varint(message, position)
            end = content + length
        else:
            raise ValueError(f"the graph is damaged: wire type {wire_type}")
        if end > len(message):
            raise ValueError("the graph is damaged: a field reaches past its end")
        yield key >> 3, message[content:end], message[start:end]
        start = end


def varint(message: bytes, position: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first; return it and where it ends."""
    number = shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise ValueError("the graph is damaged: it ends within a number")
