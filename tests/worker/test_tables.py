"""Tables that two packages hold, because neither may import the other, say the same."""

from mms_lite.worker.backends import BACKENDS
from mms_lite.worker.entry import READY_MADE
from model_archiver.manifest import READY_MADE as PACKED_HANDLERS
from model_archiver.model_files import BACKENDS as PACKED_BACKENDS


def test_model_archiver_knows_the_ready_made_handlers() -> None:
    assert sorted(PACKED_HANDLERS) == sorted(READY_MADE)


def test_model_archiver_knows_the_backends() -> None:
    assert sorted(PACKED_BACKENDS) == sorted(BACKENDS)
