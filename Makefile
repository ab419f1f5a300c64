# Every verb a developer or CI uses. `make demo` and `make test` need Python 3.11, make and the package registry only.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS ?= mxnet,onnx,openvino,opencv
# For tests only. Its wheel for Linux on PyPI brings CUDA libraries; pytorch.org has one for the CPU alone.
TORCH  ?= torch==2.13.0

.PHONY: install demo lint types test e2e test-today compat clean

install: $(STAMP) $(VENV)/.torch

# gluoncv pulls opencv-python into the folder of opencv-python-headless; the headless one,
# which needs no libGL, is written again last, and `import cv2` is tried.
$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps 'opencv-python-headless<5'
	$(BIN)/python -c 'import cv2'
	@touch $@

$(VENV)/.torch: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[torch]' '$(TORCH)'
	@touch $@

# MODEL=squeezenet (5 MB, the default) or resnet50 (95 MB).
MODEL ?= squeezenet
demo: $(STAMP)
	$(BIN)/python examples/demo.py $(MODEL)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

test: $(STAMP) $(VENV)/.torch
	$(BIN)/python -m pytest tests --ignore tests/e2e -m "not peer"

# The models without code again, with today's numpy and OpenCV: MXNet holds the environment above at numpy 1.23.
test-today:
	$(MAKE) VENV=.venv-today EXTRAS=onnx,openvino,opencv .venv-today/.torch
	.venv-today/bin/python -m pytest tests/worker tests/archiver

# The command line and the examples as a user runs them, with real weights.
e2e: $(STAMP) $(VENV)/.torch
	$(BIN)/python -m pytest tests/e2e

# Asks a real Multi Model Server (Java 17) and this one the same, and writes what differs.
compat: $(STAMP)
	$(BIN)/python benchmarks/compat/compare.py --report docs/mms-side-by-side.md

clean:
	rm -rf $(VENV) build dist *.egg-info
