# Every verb a developer or CI uses. `make demo` and `make test` need Python 3.11, make and the package registry only.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# MXNet needs numpy 1.23, and gluoncv refuses to live beside PyTorch 2: today's libraries have an environment of their own.
TODAY  := .venv-today
# tritonclient wants an older protobuf than others here: other servers' clients have an environment, too.
CLIENTS := .venv-clients
PROTOC := .venv-protos
# Its wheel for Linux on PyPI brings CUDA libraries; pytorch.org has one for the CPU alone.
TORCH  ?= torch==2.13.0

.PHONY: install demo lint types test test-today clients install-orders e2e soak protos bench bench-all profile bench-backends compat clean

install: $(STAMP)

# gluoncv pulls opencv-python into the folder of opencv-python-headless; the headless one,
# which needs no libGL, is written again last, and `import cv2` is tried.
$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mxnet,onnx,openvino,grpc,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps 'opencv-python-headless<5'
	$(BIN)/python -c 'import cv2'
	@touch $@

$(TODAY)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(TODAY)
	$(TODAY)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[onnx,openvino,torch,grpc,dev]' '$(TORCH)'
	@touch $@

$(CLIENTS)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[grpc,onnx,dev]' 'tritonclient[http,grpc]>=2.60' ovmsclient 'schemathesis>=4.32,<5'
	@touch $@

$(PROTOC)/.installed:
	$(PYTHON) -m venv $(PROTOC)
	$(PROTOC)/bin/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.85.1'
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

test: $(STAMP)
	$(BIN)/python -m pytest tests --ignore tests/e2e --ignore tests/clients -m "not peer"

# Models without code with today's numpy, OpenCV and PyTorch.
test-today: $(TODAY)/.installed
	$(TODAY)/bin/python -m pytest tests/worker tests/examples tests/process/test_tensor_routes.py tests/e2e/test_models_without_code.py

# Other servers' clients, unmodified, beside this server.
clients: $(CLIENTS)/.installed
	$(CLIENTS)/bin/python -m pytest tests/clients tests/e2e/test_protocols.py

# Server and tritonclient in one new environment, installed in either order.
install-orders: $(CLIENTS)/.installed
	$(CLIENTS)/bin/python tests/clients/install_orders.py

# The command line and the examples as a user runs them, with real weights.
e2e: $(STAMP)
	$(BIN)/python -m pytest tests/e2e

# Asks a real Multi Model Server (Java 17) and this one the same, and writes what differs.
compat: $(STAMP)
	$(BIN)/python benchmarks/compat/compare.py --report docs/mms-side-by-side.md

# What strangers send: broken messages over gRPC and REST, then all that the OpenAPI description allows, and what it does not.
SOAK_S ?= 120
soak: $(CLIENTS)/.installed
	$(CLIENTS)/bin/python tests/soak/fuzz_grpc.py --seconds $(SOAK_S)
	$(CLIENTS)/bin/python tests/soak/fuzz_rest.py --seconds $(SOAK_S)
	$(CLIENTS)/bin/python tests/soak/openapi_fuzz.py --seconds $(SOAK_S)

# The descriptor sets that mms_lite/protos loads, from its .proto files.
protos: $(PROTOC)/.installed
	$(PROTOC)/bin/python scripts/protos.py

# This server beside others, in turns on this machine (docs/performance.md). Needs ab, h2load and Java 17.
REPEAT ?= 5
SIDE_BY_SIDE := $(BIN)/python benchmarks/side_by_side

# A model that costs nothing: this server, MMS and mosec, in about eight minutes.
bench: $(STAMP)
	$(SIDE_BY_SIDE)/bench.py W0 --servers mms-lite mms mosec --repeat $(REPEAT) --out benchmarks/results/W0.json
	$(SIDE_BY_SIDE)/tables.py benchmarks/results/W0.json

# Every workload and every server: hours.
SERVERS ?= mms-lite mms mosec torchserve litserve mlserver
bench-all: $(STAMP)
	for each in W0 W1 W2 W3 W4 W5 open; do \
	    TORCH='$(TORCH)' $(SIDE_BY_SIDE)/bench.py $$each --servers $(SERVERS) --repeat $(REPEAT) \
	        --out benchmarks/results/$$each.json || exit 1; \
	done
	$(SIDE_BY_SIDE)/bench.py W6 --servers mms-lite mlserver kserve triton aiohttp grpcio --repeat $(REPEAT) --out benchmarks/results/W6.json
	$(SIDE_BY_SIDE)/tables.py benchmarks/results/*.json

# Where a request's microseconds go, by part of the server; written into docs/performance.md. A minute.
profile: $(STAMP)
	$(BIN)/python benchmarks/profile/breakdown.py

# Every published model in every backend: same answers, time, memory; written into docs/backends.md.
bench-backends: $(STAMP) $(TODAY)/.installed
	$(TODAY)/bin/python benchmarks/backends/measure.py --out .backends-today.json
	$(BIN)/python benchmarks/backends/measure.py --out .backends-mxnet.json resnet50-mxnet squeezenet-mxnet
	$(BIN)/python benchmarks/backends/table.py .backends-today.json .backends-mxnet.json
	rm .backends-today.json .backends-mxnet.json

clean:
	rm -rf $(VENV) $(TODAY) $(CLIENTS) $(PROTOC) build dist *.egg-info
