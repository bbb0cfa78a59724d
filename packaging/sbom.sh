#!/bin/sh
# sbom.sh TOOLS PYTHON OUT: writes what the environment of PYTHON holds as a CycloneDX list of components.
#
# It is the same for the same environment. TOOLS is the virtual environment of locks/package.txt.
set -eu
"$1/bin/cyclonedx-py" environment --pyproject "$(dirname "$0")/../pyproject.toml" --mc-type application \
    --output-reproducible --of JSON --spec-version 1.6 -o "$3" "$2"
"$1/bin/python" "$(dirname "$0")/check_sbom.py" "$3" "$(dirname "$0")/locks/host.txt"
