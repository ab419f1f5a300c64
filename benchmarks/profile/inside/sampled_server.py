"""mms-lite with a sampler in its process: `python sampled_server.py FOLDER PROCESS_NAME [OPTION ...]`.

The process's name among its arguments keeps the command line from starting another process for the server.
"""

import os
import sys

import sampler

from mms_lite.cli import main

os.environ[sampler.FOLDER] = sys.argv[1]
sampler.listen(sys.argv[1])
del sys.argv[1:3]
main()
