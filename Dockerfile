# CPU:   docker build -t ppfr-bench .
# CUDA:  docker build -t ppfr-bench:cuda --build-arg TORCH=cu128 .
# Run:   docker run --rm -v "$PWD":/work ppfr-bench run --defense partialface --attack unet   (CUDA: --gpus all)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY attacks attacks
COPY bench bench
COPY defenses defenses
COPY reports reports
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
# Build of torch, as PyTorch's index names it: cpu, or that of a CUDA release.
ARG TORCH=cpu
# Triton compiles what launches its kernels.
RUN test "${TORCH}" = cpu || { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; }
# Where pip finds torch and torchvision: of a mirror, or of PyPI (https://pypi.org/simple), which has the CUDA build alone.
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
RUN pip install --no-cache-dir torch torchvision --index-url "${TORCH_INDEX}"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl
# Also for whoever is named by docker run --user, so that runs belong to the caller.
RUN useradd --create-home bench && install -d -m 1777 /work /cache
ENV HOME=/cache BENCH_CACHE=/cache/ppfr-bench
USER bench
WORKDIR /work
ENTRYPOINT ["bench"]
CMD ["--help"]
