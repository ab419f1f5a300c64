"""`python -m mms_lite`: the same program as `mms-lite`."""

from mms_lite.cli import main

if __name__ == "__main__":
    main()
