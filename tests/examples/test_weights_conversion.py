"""Tests of what examples/weights reads and writes, on files of a few bytes."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights import graphdef, pth, published
from weights.networks import Layers, Network


def field(number: int, content: bytes) -> bytes:
    """A short field of bytes, as protobuf writes it."""
    return bytes([number << 3 | 2, len(content)]) + content


def node(name: str, *inputs: str) -> bytes:
    attribute = field(5, b"something that is kept as it is")
    sources = b"".join(field(3, source.encode()) for source in inputs)
    return field(1, field(1, name.encode()) + field(2, b"Operation") + sources + attribute)


VERSIONS = field(4, bytes([1 << 3, 0x96, 1]))  # producer: 150, a number of two bytes


def test_a_cut_graph_keeps_what_its_output_is_computed_from() -> None:
    nodes = {
        "image": node("image"),
        "weights": node("weights"),
        "initialised": node("initialised"),
        "logits": node("logits", "image", "weights:1", "^initialised"),
        "head": node("head", "logits"),
        "unused": node("unused"),
    }

    kept = graphdef.cut(b"".join(nodes.values()) + VERSIONS, "logits")

    assert kept == b"".join(nodes[name] for name in ("image", "weights", "initialised", "logits")) + VERSIONS


@pytest.mark.parametrize(
    ("graph", "output", "reason"),
    [
        (node("logits", "image"), "logits", "no node image"),
        (node("logits"), "prob", "no node prob"),
        (node("logits")[:-1], "logits", "past its end"),
        (node("logits") + b"\x0b", "logits", "wire type 3"),
        (node("logits") + b"\x80", "logits", "ends within a number"),
    ],
)
def test_a_graph_that_cannot_be_cut_says_why(graph: bytes, output: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        graphdef.cut(graph, output)


def checkpoint(*pickles: Any) -> io.BytesIO:
    head = (pth.MAGIC, pth.PROTOCOL, {"little_endian": True})
    return io.BytesIO(b"".join(pickle.dumps(content, protocol=2) for content in (*head, *pickles)))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made-by-a-checkpoint",)


def test_a_checkpoint_with_code_is_refused_unrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(pickle.UnpicklingError, match=r"no use for posix\.mkdir"):
        pth.read(checkpoint({"weight": Harmful()}, []))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"before 1\.6"):
        pth.read(io.BytesIO(pickle.dumps("something", protocol=2)))


def test_a_checkpoint_is_read_as_pytorch_reads_it() -> None:
    torch = pytest.importorskip("torch")
    state = {"kernel": torch.randn(2, 3, 1, 1), "turned": torch.randn(4, 5).T, "steps": torch.tensor(7)}
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    file.seek(0)

    arrays = pth.read(file)

    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(3, (2,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,))]
)
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(
    offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="out of its storage"):
        pth.view(pth.Tensor("0", offset, shape, strides), np.zeros(4, np.float32))


def every_layer(net: Layers, image: Any) -> Any:
    """Each kind of layer once, with what formats may take differently: odd pads, strides, groups."""
    value = net.relu(net.conv(image, "first", stride=2, pads=(0, 1, 2, 3)))
    value = net.relu6(net.conv(value, "depthwise", pads=(1, 1, 1, 1), groups=4))
    value = net.concat(net.add(value, value), net.conv(value, "point.wise"))
    return net.softmax(net.dense(net.mean(net.max_pool(value, pads=(1, 1, 1, 1))), "dense"))


NETWORK = Network(every_layer, 32)


def random_arrays(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed=1)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes}


ARRAYS = {
    "first": (4, 3, 3, 3),
    "depthwise": (4, 1, 3, 3),
    "point.wise": (6, 4, 1, 1),
    "dense": (1000, 10),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_network_answers_the_same_as_onnx_torchscript_and_exported_program(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from weights import onnx_network, torch_network

    arrays = random_arrays((f"{name}/kernel", shape) for name, shape in ARRAYS.items())
    arrays |= random_arrays((f"{name}/bias", shape[:1]) for name, shape in ARRAYS.items())
    onnx_network.write(NETWORK, "every_layer", arrays, tmp_path / "net.onnx")
    script, program = torch_network.write(NETWORK, arrays, tmp_path / "net")

    for count in (1, 3):
        data = np.random.default_rng(count).normal(size=(count, 3, 32, 32)).astype(np.float32)
        expected = onnx_network.classify(tmp_path / "net.onnx", data)
        np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=1e-5)
        for path in (script, program):
            np.testing.assert_allclose(torch_network.classify(path, data), expected, rtol=1e-3, atol=1e-6)


def test_a_folded_batch_norm_changes_no_answer() -> None:
    arrays = random_arrays(
        [("conv/kernel", (5, 3, 1, 1)), ("conv/bias", (5,)), ("other/kernel", (2, 2))]
        + [(f"norm/{kind}", (5,)) for kind in ("gamma", "beta", "moving_mean", "moving_variance")]
    )
    arrays["norm/moving_variance"] **= 2
    pixel = np.array([0.5, -1, 2], np.float32)

    convolved = arrays["conv/kernel"][:, :, 0, 0] @ pixel + arrays["conv/bias"]
    centred = (convolved - arrays["norm/moving_mean"]) / np.sqrt(arrays["norm/moving_variance"] + 1e-3)
    folded = published.fold_norms(arrays, {"conv": "norm"})

    assert folded.keys() == {"conv/kernel", "conv/bias", "other/kernel"}
    np.testing.assert_allclose(
        folded["conv/kernel"][:, :, 0, 0] @ pixel + folded["conv/bias"],
        centred * arrays["norm/gamma"] + arrays["norm/beta"],
        rtol=1e-4,
    )


def test_folded_preprocessing_takes_rgb_instead_of_bgr() -> None:
    kernel, bias = (
        random_arrays([("kernel", (1, 1, 3, 4)), ("bias", (4,))])[name] for name in ("kernel", "bias")
    )
    rgb = np.array([10.0, 100.0, 250.0])
    bgr_mean = (103.939, 116.779, 123.68)
    mean, std = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])

    folded_kernel, folded_bias = published.fold_preprocessing(kernel, bias, bgr_mean)

    np.testing.assert_allclose(
        ((rgb - mean) / std) @ folded_kernel[0, 0] + folded_bias,
        (rgb[::-1] - np.array(bgr_mean)) @ kernel[0, 0] + bias,
        rtol=1e-4,
    )
