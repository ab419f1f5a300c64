"""Show that server and tritonclient live in one environment, installed in either order.

    python tests/clients/install_orders.py

For each order: a fresh environment, `pip check`, and in it a server that tritonclient asks by both protocols.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = ("--editable", f"{HERE.parent.parent}[grpc]")
CLIENT = ("tritonclient[http,grpc]",)
ORDERS = {"server first": (SERVER, CLIENT), "client first": (CLIENT, SERVER)}


def main() -> None:
    """Try both orders, or with `--ask` what can be tried in this environment."""
    if sys.argv[1:] == ["--ask"]:
        ask()
        return
    for order, steps in ORDERS.items():
        with tempfile.TemporaryDirectory(prefix="mms-lite-clients-") as folder:
            venv.create(folder, with_pip=True)
            python = str(Path(folder) / "bin" / "python")
            for step in steps:
                run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step)
            run(python, "-m", "pip", "check")
            run(python, __file__, "--ask")
        print(f"{order}: installed without conflict, and each answered the other")


def run(*command: str) -> None:
    """Run a command, or end with its exit code."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def ask() -> None:
    """Serve one model and ask it with tritonclient, beside the server's own messages in this process."""
    import numpy as np
    import tritonclient.grpc
    import tritonclient.http
    from client_models import add_identity
    from client_server import Server

    from mms_lite.protos import message

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    with tempfile.TemporaryDirectory(prefix="mms-lite-clients-") as folder:
        repository = Path(folder) / "models"
        add_identity(repository, "FP32")
        server = Server(Path(folder), model_repository=repository)
        try:
            server.start()
            for module, url in ((tritonclient.http, server.http), (tritonclient.grpc, server.grpc)):
                with module.InferenceServerClient(url) as client:
                    tensor = module.InferInput("INPUT0", [2, 3], "FP32").set_data_from_numpy(array)
                    found = client.infer("identity_FP32", [tensor]).as_numpy("OUTPUT0")
                    assert (found == array).all(), found
        finally:
            server.end()
    sent = tritonclient.grpc.service_pb2.ModelInferRequest(model_name="either", raw_input_contents=[b"x"])
    read = message("inference.ModelInferRequest").FromString(sent.SerializeToString())
    assert (read.model_name, list(read.raw_input_contents)) == ("either", [b"x"])


if __name__ == "__main__":
    main()
