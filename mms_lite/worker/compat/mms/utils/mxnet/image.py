"""mms.utils.mxnet.image: MXNet's image functions under MMS's names.

Images are NDArrays of shape (height, width, channel) unless a function says otherwise.
"""

import base64
import io
from typing import Any


def read(buf: Any, flag: int = 1, to_rgb: bool = True, out: Any = None) -> Any:
    """Decode an image file's bytes; flag 0 gives one grey channel, to_rgb=False gives BGR."""
    from mxnet import image

    return image.imdecode(buf, flag, to_rgb, out)


def write(img_arr: Any, flag: int = 1, format: str = "jpeg", dim_order: str = "CHW") -> str:
    """Return the image (RGB, or grey with flag 0) as a file in base64 text.

    Raises: ValueError if dim_order is neither "CHW" nor "HWC".
    """
    from PIL import Image

    if dim_order not in ("CHW", "HWC"):
        raise ValueError("dim_order must be 'CHW' or 'HWC'.")
    if dim_order == "CHW":
        img_arr = img_arr.transpose((1, 2, 0))
    if flag != 1:
        img_arr = img_arr.reshape(img_arr.shape[:2])
    file = io.BytesIO()
    Image.fromarray(img_arr.astype("uint8").asnumpy()).save(file, format=format)
    return base64.b64encode(file.getvalue()).decode("ascii")


def transform_shape(img_arr: Any, dim_order: str = "NCHW") -> Any:
    """Return a batch of one: (1, channel, height, width), or (1, height, width, channel) for "NHWC".

    Raises: ValueError for another dim_order.
    """
    if dim_order not in ("NCHW", "NHWC"):
        raise ValueError("dim_order must be 'NCHW' or 'NHWC'.")
    if dim_order == "NCHW":
        img_arr = img_arr.transpose((2, 0, 1))
    return img_arr.expand_dims(axis=0)


def resize(src: Any, new_width: int, new_height: int, interp: int = 2) -> Any:
    """Scale an image; interp is OpenCV's number, 2 = area."""
    from mxnet import image

    return image.imresize(src, new_width, new_height, interp)


def fixed_crop(
    src: Any, x0: int, y0: int, w: int, h: int, size: tuple[int, int] | None = None, interp: int = 2
) -> Any:
    """Cut out w x h pixels at (x0, y0), scaled to size = (width, height) if given."""
    from mxnet import image

    return image.fixed_crop(src, x0, y0, w, h, size, interp)


def random_crop(src: Any, size: tuple[int, int], interp: int = 2) -> Any:
    """Cut out size = (width, height) at random; returns (image, (x0, y0, width, height))."""
    from mxnet import image

    return image.random_crop(src, size, interp)


def color_normalize(src: Any, mean: Any, std: Any = None) -> Any:
    """Return (src - mean) / std as float32."""
    from mxnet import image

    return image.color_normalize(src.astype("float32"), mean, std)
