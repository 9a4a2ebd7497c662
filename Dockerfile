# A GPU service: examples/service.py over an engine folder, without compilers, torch or the exporter.
#
#   docker build -t mistral-trt .
#   docker run --rm --gpus all -p 8000:8000 -v "$PWD/engine:/engine:ro" -v mistral-trt-cache:/cache mistral-trt
#
# The versions are those of requirements.lock. A plan runs in the TensorRT-RTX release that built it and in no
# other; for an older plan, --build-arg TENSORRT_RTX=VERSION. Nothing of CUDA comes with the image: the driver's
# libraries and nvidia-smi are put in by NVIDIA's container toolkit (--gpus), and the driver must be one for
# CUDA 13. To pin the base image by digest, --build-arg BASE=python@sha256:…
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY src src
COPY export export
COPY engines engines
COPY runtime runtime
COPY validate validate
RUN pip install -c requirements.lock setuptools \
 && pip wheel --no-build-isolation --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG TENSORRT_RTX=1.7.1.116
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 10001 --create-home service \
 && install --directory --owner=service --group=service /cache
WORKDIR /app
COPY requirements.lock ./
RUN grep --invert-match '^tensorrt' requirements.lock > constraints.txt \
 && pip install -c constraints.txt "tensorrt-rtx==${TENSORRT_RTX}"
COPY --from=wheel /wheels /wheels
RUN pip install -c constraints.txt "$(ls /wheels/*.whl)[gpu,service]"
COPY examples/service.py ./
USER service
EXPOSE 8000
# Loading takes its time: kernels are compiled, weights put in, every batch size warmed up.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "service.py"]
CMD ["/engine", "--host", "0.0.0.0", "--port", "8000"]
