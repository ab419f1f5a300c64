#!/bin/sh
# Install the Debian or Ubuntu packages that slim images lack. Run as root; does nothing where all is there.
#   libgomp1                MXNet
#   libgl1, libglib2.0-0    OpenCV, when opencv-python is installed beside opencv-python-headless
#   apache2-utils, curl     the load tests of `make e2e`, the commands of the README
#   nghttp2-client          h2load, for gRPC in `make bench-all`
set -eu
missing=""
for package in libgomp1 libgl1 libglib2.0-0 apache2-utils curl nghttp2-client; do
    dpkg-query --show --showformat='${Status}\n' "$package" 2>/dev/null | grep -q "install ok installed" ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -qq -y --no-install-recommends $missing
fi
