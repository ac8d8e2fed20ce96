#!/usr/bin/env bash
# Make stand-ins for the images that docker-compose.yml names, for machines that can reach no image registry:
# a Debian with the Triton of the nvidia-pytriton wheel where NVIDIA's image has it, and one with Prometheus.
#   tests/deploy/standin.sh FOLDER        FOLDER keeps what was downloaded, about 1 GB
# Needs root, debootstrap, a Docker engine (DOCKER_HOST), and .venv (make setup) with this Python's packages.
set -euo pipefail
folder=$(realpath -m "${1:?Usage: tests/deploy/standin.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
site=$("$python" -c 'import pytriton, pathlib; print(pathlib.Path(pytriton.__file__).parents[1])')
suite=${DEBIAN_SUITE:-bookworm} # its Python must be the one of .venv: 3.11
mkdir -p "$folder/triton/wheels"

if ! docker image inspect morphserve-base:standin >/dev/null 2>&1; then
    [ -d "$folder/root" ] || debootstrap --variant=minbase \
        --include=ca-certificates,python3,python3-pip,curl,libpython3.11,libgomp1 "$suite" "$folder/root" >/dev/null
    tar -C "$folder/root" -c . | docker import - morphserve-base:standin
fi

"$python" -m pip download -q -d "$folder/triton/wheels" -c constraints/cpu.txt "setuptools>=77" wheel \
    ".[server,openai-server]"
rm -rf "$folder/triton/tritonserver" "$folder/triton/lib"
cp -r "$site/pytriton/tritonserver" "$folder/triton/tritonserver"
cp -r "$site/nvidia_pytriton.libs" "$folder/triton/lib"
cp "$folder/triton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub" \
    "$folder/triton/tritonserver/backends/python/"
chmod +x "$folder/triton/tritonserver/bin/tritonserver" \
    "$folder/triton/tritonserver/backends/python/triton_python_backend_stub"
docker build --network=host -q -t nvcr.io/nvidia/tritonserver:standin -f - "$folder/triton" <<'END'
FROM morphserve-base:standin
COPY tritonserver /opt/tritonserver
COPY lib /opt/tritonserver/lib
COPY wheels /wheels
ENV LD_LIBRARY_PATH=/opt/tritonserver/lib \
    PATH=/opt/tritonserver/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
END
docker build --network=host -q -t prom/prometheus:standin - <<'END'
FROM morphserve-base:standin
RUN apt-get update -q && apt-get install -qy --no-install-recommends prometheus wget \
    && mkdir -p /prometheus && chmod 777 /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["prometheus"]
END
