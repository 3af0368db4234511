# One image for every process of a cluster: `docker build -t trilith:0.1 .`, then `docker run --rm trilith:0.1 --help`.
# Servers listen on loopback unless they are told otherwise: `docker run trilith:0.1 ps --listen 0.0.0.0:7000`, and publish
# the port where those reach it who shall, for nobody is asked who they are.
#
# Wheels in wheelhouse/ are taken before those of an index. With torch's among them it builds without torch's own index
# (TORCH_INDEX=), with all of them (pip download -d wheelhouse ...) without a network (PIP_ARGS=--no-index).
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS packages
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# PyTorch's own index of its CPU builds; the default ones are for CUDA, and several times as large.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_ARGS=""
COPY pyproject.toml requirements.lock wheelhouse* /wheelhouse/
RUN cd /wheelhouse \
 && python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = project["optional-dependencies"]; \
print(*project["dependencies"], *extras["serving"], *extras["console"], sep="\n")' > requirements.txt \
 && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} --find-links . $PIP_ARGS \
      -c requirements.lock -r requirements.txt

FROM packages AS build
COPY LICENSE README.md pyproject.toml /src/
COPY protos /src/protos
COPY client /src/client
COPY services /src/services
COPY deploy/compile_kernels.py /src/deploy/
ARG PIP_ARGS=""
RUN pip install --no-cache-dir --no-deps --find-links /wheelhouse $PIP_ARGS --target /opt/trilith/lib /src
# Kernels are compiled once, here, for this kind of processor: no container waits for them, or needs a place to keep them.
ENV PYTHONPATH=/opt/trilith/lib
RUN TRILITH_CACHE=/opt/trilith python3 /src/deploy/compile_kernels.py && chmod -R a+rX /opt/trilith

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title=trilith
RUN useradd --uid 10001 --home-dir /data --shell /usr/sbin/nologin trilith \
 && install -d -o trilith -g trilith /data /data/cache /data/exports /data/model /data/workers
# Apart, because packages change seldom.
COPY --from=packages /opt/venv /opt/venv
COPY --from=build /opt/trilith /opt/trilith
ENV PATH=/opt/trilith/lib/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/trilith/lib PYTHONUNBUFFERED=1 \
    TRILITH_CACHE=/data/cache TRILITH_KERNELS=/opt/trilith/kernels
USER 10001:10001
ENTRYPOINT ["trilith"]
